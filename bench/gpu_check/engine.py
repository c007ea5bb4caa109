"""Section `engine`: scheduler, uploads, graphs and late reads together, as a replica runs them.

First the tokens: one step ahead over graphs against step by step without them, in float32, for every kind of
sampling. Then, on a GPU, what an engine of the smallest served shape decodes per second, looking ahead and
not: the difference is what the host costs. The KV cache is sized by measured memory, as in a replica.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting
from bench.gpu_check.shapes import random_weights, served_shapes, small_shapes, spec_of
from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.engine.engine import Engine
from replicas.engine.scheduler import Scheduler
from replicas.models.spec import ModelSpec
from replicas.models.weights import ModelWeights
from replicas.parallel.collectives import SoloCollectives
from replicas.parallel.degrees import shard_of
from replicas.rank.device_kernels import load_device_kernels
from replicas.rank.device_setup import cuda_support
from replicas.rank.device_steps import DeviceSupport
from replicas.rank.graphs import EagerBackend
from replicas.rank.model import shape_of
from replicas.rank.runner import ModelRunner
from replicas.rank.transfer import HostTransfer
from replicas.request import GenerationRequest, SamplingParams

_SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(repetition_penalty=1.4, num_logprobs=1),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=20, seed=7),
    SamplingParams(logit_bias=((7, 3.0),)),
)
_PROMPT_TOKENS = 64
_MEASURED_STEPS = 64


def run(setting: Setting, report: SectionReport) -> None:
    shapes = small_shapes(is_tiny=setting.is_tiny)
    for shape in shapes[:1] if setting.is_tiny else shapes:
        _compare_tokens(setting, report, shape.name, spec_of(shape))
    if not setting.is_cuda:
        report.skip("tok/s of the engine: a graph that is run again says nothing")
        return
    smallest = served_shapes()[0]
    _measure(setting, report, smallest.name, spec_of(smallest))


def _compare_tokens(setting: Setting, report: SectionReport, name: str, spec: ModelSpec) -> None:
    limits = EngineLimits(
        max_sequences=3 if setting.is_tiny else 11,
        step_tokens=24,
        num_blocks=64,
        context_tokens=64,
        lookahead=1,
    )
    plain = replace(limits, lookahead=0, cuda_graphs=False)
    weights = random_weights(
        spec, shard_of(spec, ParallelConfig(), 0), device=setting.device, dtype=torch.float32
    )
    wanted = _tokens(_make_runner(setting, spec, weights, plain), plain, _requests(setting))
    runner = _make_runner(setting, spec, weights, limits)
    warmed: dict[str, float] = {}
    if setting.is_cuda:
        began_s = time.monotonic()
        runner.warmup()
        warmed["warmup_s"] = time.monotonic() - began_s
    got = _tokens(runner, limits, _requests(setting))
    report.check(got == wanted, model=name, requests=len(wanted), **warmed)


def _measure(setting: Setting, report: SectionReport, name: str, spec: ModelSpec) -> None:
    weights = random_weights(
        spec, shard_of(spec, ParallelConfig(), 0), device=setting.device, dtype=setting.dtype
    )
    for lookahead in (1, 0):
        limits = EngineLimits(
            max_sequences=64, step_tokens=2048, context_tokens=1024, gpu_memory_ratio=0.8, lookahead=lookahead
        )
        runner = _make_runner(setting, spec, weights, limits)
        runner.size_cache()
        runner.warmup()
        for batch in (1, 8, 64):
            if not report.has_time(5.0):
                report.skip(f"engine at batch {batch}: the budget is spent")
                continue
            seconds = _decode_seconds(runner, limits, batch)
            report.row(
                model=name,
                batch=batch,
                lookahead=lookahead,
                kv_blocks=runner.num_blocks,
                step_ms=1e3 * seconds / _MEASURED_STEPS,
                decode_tok_s=batch * _MEASURED_STEPS / seconds,
            )
        runner.close()
        del runner


def _decode_seconds(runner: ModelRunner, limits: EngineLimits, batch: int) -> float:
    """Of `_MEASURED_STEPS` steps in which every sequence decodes."""
    engine = Engine(runner, Scheduler(limits, shape_of(runner)), lookahead=limits.lookahead)
    for request_id in range(batch):
        prompt = tuple(3 + (request_id + 7 * pos) % 1000 for pos in range(_PROMPT_TOKENS))
        engine.submit(
            GenerationRequest(request_id=request_id, prompt_ids=prompt, max_tokens=2 * _MEASURED_STEPS)
        )
    decoding: set[int] = set()
    while len(decoding) < batch:
        decoding.update(delta.request_id for delta in engine.step().deltas)
    began_s = time.monotonic()
    for _ in range(_MEASURED_STEPS):
        engine.step()
    seconds = time.monotonic() - began_s
    for request_id in range(batch):
        engine.cancel(request_id)
    while engine.has_work:
        engine.step()
    return seconds


def _make_runner(
    setting: Setting, spec: ModelSpec, weights: ModelWeights, limits: EngineLimits
) -> ModelRunner:
    config = RankConfig(
        group="gpu-check",
        epoch=1,
        rank=0,
        source="",
        parallel=ParallelConfig(),
        limits=limits,
        device=setting.device.type,
        kernels="auto" if setting.is_cuda else "off",
    )
    if setting.is_cuda:
        support = cuda_support(config, setting.device)
    else:
        graphs = EagerBackend() if limits.cuda_graphs else None
        support = DeviceSupport(transfer=HostTransfer(), graphs=graphs, kernels=load_device_kernels())
    return ModelRunner(
        config,
        SoloCollectives(),
        spec=spec,
        shard=shard_of(spec, config.parallel, 0),
        weights=weights,
        weights_digest="",
        support=support,
    )


def _requests(setting: Setting) -> list[GenerationRequest]:
    """Some of which begin the same; few and short in the interpreter."""
    count, num_tokens = (2, 2) if setting.is_tiny else (14, 20)
    return [
        GenerationRequest(
            request_id=index,
            prompt_ids=(*range(3, 21), 7 + index)[index % 5 * 4 :],
            max_tokens=num_tokens,
            sampling=_SAMPLINGS[index % len(_SAMPLINGS)],
        )
        for index in range(count)
    ]


def _tokens(
    runner: ModelRunner, limits: EngineLimits, requests: list[GenerationRequest]
) -> dict[int, list[int]]:
    engine = Engine(runner, Scheduler(limits, shape_of(runner)), lookahead=limits.lookahead)
    for request in requests:
        engine.submit(request)
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for delta in engine.step().deltas:
            tokens[delta.request_id] += delta.token_ids
    return tokens
