"""A model behind an engine in this process, and what it answers to a mix of requests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from replicas.config import EngineLimits, ParallelConfig
from replicas.engine.engine import Engine
from replicas.engine.scheduler import Scheduler
from replicas.parallel.collectives import SoloCollectives
from replicas.rank.device_steps import DeviceSupport
from replicas.rank.model import shape_of
from replicas.rank.runner import ModelRunner
from replicas.request import FinishReason, GenerationRequest, SequenceDelta, StepMember, TokenLogprobs
from tests.rank_threads import make_rank_config


@dataclass(slots=True, kw_only=True)
class Answers:
    """What came out, per request; and how the engine's work was counted."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    last: dict[int, SequenceDelta] = field(default_factory=dict)
    members: list[StepMember] = field(default_factory=list)
    experts_hit: list[int] = field(default_factory=list)
    num_cached: int = 0

    @property
    def finishes(self) -> dict[int, FinishReason | None]:
        return {request_id: delta.finish for request_id, delta in self.last.items()}

    @property
    def num_preemptions(self) -> int:
        return sum(delta.timing.preemptions for delta in self.last.values() if delta.timing)

    @property
    def num_wasted(self) -> int:
        return sum(delta.timing.wasted_tokens for delta in self.last.values() if delta.timing)


def make_runner(
    source: Path,
    limits: EngineLimits,
    support: DeviceSupport | None = None,
    device: torch.device | None = None,
) -> ModelRunner:
    """In float32, on the CPU unless told otherwise, where torch computes."""
    config = make_rank_config(
        source.parent, rank=0, parallel=ParallelConfig(), source=str(source), limits=limits
    )
    config = replace(config, kernels="off", dtype="float32", device=str(device or "cpu"))
    return ModelRunner.build(config, SoloCollectives(), lambda stage, done, total: None, support)


def answer(runner: ModelRunner, limits: EngineLimits, requests: list[GenerationRequest]) -> Answers:
    """Half of the requests at once, the others one by one behind every third step."""
    engine = Engine(runner, Scheduler(limits, shape_of(runner)), lookahead=limits.lookahead)
    answers = Answers()
    waiting = list(requests[len(requests) // 2 :])
    for request in requests[: len(requests) // 2]:
        engine.submit(request)
    num_steps = 0
    while engine.has_work or waiting:
        if waiting and num_steps % 3 == 0:
            engine.submit(waiting.pop(0))
        result = engine.step()
        num_steps += 1
        for delta in result.deltas:
            answers.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            answers.logprobs.setdefault(delta.request_id, []).extend(delta.logprobs)
            if delta.finish is not None:
                answers.last[delta.request_id] = delta
        if result.record is not None:
            answers.members.extend(result.record.members)
            answers.experts_hit.append(result.record.experts_hit)
    answers.num_cached = engine.load.cached_tokens_total
    return answers
