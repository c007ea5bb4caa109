"""Section `tokens`: scheduler, uploads, graphs and late reads together draw what plain steps draw.

One step ahead over graphs against step by step without them, in float32, for every kind of sampling.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch

from bench.gpu_check.engine_runner import make_runner
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting
from bench.gpu_check.shapes import random_weights, small_shapes, spec_of
from replicas.config import EngineLimits, ParallelConfig
from replicas.engine.engine import Engine
from replicas.engine.scheduler import Scheduler
from replicas.models.spec import ModelSpec
from replicas.parallel.degrees import shard_of
from replicas.rank.model import shape_of
from replicas.rank.runner import ModelRunner
from replicas.request import GenerationRequest, SamplingParams

_SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(repetition_penalty=1.4, num_logprobs=1),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=20, seed=7),
    SamplingParams(logit_bias=((7, 3.0),)),
)


def run(setting: Setting, report: SectionReport) -> None:
    shapes = small_shapes(is_tiny=setting.is_tiny)
    for shape in shapes[:1] if setting.is_tiny else shapes:
        report.attempt(shape.name, partial(_compare_tokens, setting, report, shape.name, spec_of(shape)))


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
    wanted = _tokens(make_runner(setting, spec, weights, plain), plain, _requests(setting))
    runner = make_runner(setting, spec, weights, limits)
    warmed: dict[str, float] = {}
    if setting.is_cuda:
        began_s = time.monotonic()
        runner.warmup()
        warmed["warmup_s"] = time.monotonic() - began_s
    got = _tokens(runner, limits, _requests(setting))
    differing = [index for index, tokens in wanted.items() if got[index] != tokens]
    report.check(not differing, model=name, requests=len(wanted), differing=differing, **warmed)


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
