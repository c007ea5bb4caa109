"""Section `engine`: what the whole engine decodes per second, looking ahead and not.

Scheduler, uploads, graphs and late reads of a replica, without its processes; the difference between looking
ahead and not is what the host costs. The KV cache is sized by measured memory, as in a replica.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from functools import partial

from bench.gpu_check.engine_runner import make_runner
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting
from bench.gpu_check.shapes import Shape, random_weights, served_shapes, small_shapes, spec_of
from replicas.config import EngineLimits, ParallelConfig
from replicas.engine.engine import Engine
from replicas.engine.scheduler import Scheduler
from replicas.models.weights import ModelWeights
from replicas.parallel.degrees import shard_of
from replicas.rank.model import shape_of
from replicas.request import GenerationRequest

_SHAPES = ("Llama-3.2-1B", "granite-3.0-1b-a400m")
"""The fastest steps: there the host shows."""
_LIMITS = EngineLimits(max_sequences=64, step_tokens=2048, context_tokens=1024, gpu_memory_ratio=0.8)
_TINY_LIMITS = EngineLimits(max_sequences=2, step_tokens=8, num_blocks=8, context_tokens=16)
_LOAD = (1, 8, 64), 64, 128
_TINY_LOAD = (1, 2), 3, 2
"""Batches, tokens of a prompt, and steps that are timed."""


def run(setting: Setting, report: SectionReport) -> None:
    served = [shape for shape in served_shapes() if shape.name in _SHAPES]
    for shape in small_shapes(is_tiny=True)[:1] if setting.is_tiny else served:
        spec = spec_of(shape)
        shard = shard_of(spec, ParallelConfig(), 0)
        weights = random_weights(spec, shard, device=setting.device, dtype=setting.dtype)
        for lookahead in (1,) if setting.is_tiny else (1, 0):
            if not report.has_time(10.0 if setting.is_cuda else 0.0):
                report.skip(f"{shape.name}, lookahead {lookahead}: out of time")
                continue
            what = f"{shape.name}, lookahead {lookahead}"
            report.attempt(what, partial(_measure, setting, report, shape, weights, lookahead))
            gc.collect()  # A runner is a circle of objects; its graphs and cache are not small.


def _measure(
    setting: Setting, report: SectionReport, shape: Shape, weights: ModelWeights, lookahead: int
) -> None:
    limits = replace(_TINY_LIMITS if setting.is_tiny else _LIMITS, lookahead=lookahead)
    batches, prompt_tokens, num_steps = _TINY_LOAD if setting.is_tiny else _LOAD
    began_s = time.monotonic()
    runner = make_runner(setting, spec_of(shape), weights, limits)
    if setting.is_cuda:
        runner.size_cache()
        runner.warmup()
    start_s = time.monotonic() - began_s
    # One for all batches: rows that a batch leaves are freed by the plans of the next.
    engine = Engine(runner, Scheduler(limits, shape_of(runner)), lookahead=limits.lookahead)
    for batch in batches:
        if not report.has_time(3.0 if setting.is_cuda else 0.0):
            report.skip(f"{shape.name} at batch {batch}: out of time")
            continue
        seconds = _decode_seconds(engine, batch, prompt_tokens, num_steps)
        report.row(
            model=shape.name,
            batch=batch,
            lookahead=lookahead,
            kv_blocks=runner.num_blocks,
            start_s=start_s,
            step_ms=1e3 * seconds / num_steps,
            decode_tok_s=batch * num_steps / seconds,
        )
    runner.close()


def _decode_seconds(engine: Engine, batch: int, prompt_tokens: int, num_steps: int) -> float:
    """Of `num_steps` steps in which every sequence decodes."""
    for request_id in range(batch):
        prompt = tuple(3 + (request_id + 7 * pos) % 1000 for pos in range(prompt_tokens))
        engine.submit(
            GenerationRequest(request_id=request_id, prompt_ids=prompt, max_tokens=2 * num_steps + batch)
        )
    decoding: set[int] = set()
    while len(decoding) < batch:
        decoding.update(delta.request_id for delta in engine.step().deltas)
    began_s = time.monotonic()
    for _ in range(num_steps):
        engine.step()
    seconds = time.monotonic() - began_s
    for request_id in range(batch):
        engine.cancel(request_id)
    while engine.has_work:
        engine.step()
    return seconds
