"""The `dispatch` layout under a real scheduler: the answers of one rank alone, whatever shares its steps.

Every rank runs a scheduler of its own here; they agree because a step's outcome is the same on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.engine.engine import Engine
from replicas.engine.scheduler import Scheduler
from replicas.expert_loads import EMPTY_SLOT, ExpertLoads
from replicas.parallel.collectives import Collectives
from replicas.rank.model import shape_of
from replicas.rank.runner import ModelRunner
from replicas.request import FinishReason, GenerationRequest, SamplingParams, SequenceDelta, TokenLogprobs
from tests.checkpoints import make_granite_moe
from tests.rank_threads import make_rank_config, run_rank_threads

LIMITS = EngineLimits(max_sequences=3, step_tokens=16, block_tokens=4, num_blocks=20, context_tokens=72)
POISON_ID = 509
LOGPROB_ERROR = 1e-4


@dataclass(slots=True, kw_only=True)
class Answers:
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    scores: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Of the tokens of prompts."""
    last: dict[int, SequenceDelta] = field(default_factory=dict)
    loads: list[ExpertLoads] = field(default_factory=list)
    """After every step."""


@pytest.fixture(scope="module")
def granite_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_granite_moe(tmp_path_factory.mktemp("models") / "granite-moe", vocab_size=515, seed=13)


def make_requests() -> list[GenerationRequest]:
    """Five in lane 0, more than its rows and blocks hold; the third of four lanes stays empty."""
    hot = SamplingParams(temperature=0.9, top_p=0.9, seed=5)
    edited = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((9, 4.0),))
    told = SamplingParams(temperature=0.7, top_k=40, seed=11, num_logprobs=3)
    kinds = [SamplingParams(), hot, edited, told, SamplingParams(num_logprobs=0), hot, SamplingParams()]
    lanes, lengths = (0, 0, 0, 0, 0, 1, 3), (5, 30, 11, 1, 24, 40, 3)
    return [
        GenerationRequest(
            request_id=index + 1,
            prompt_ids=tuple(range(20 + 9 * index, 20 + 9 * index + length)),
            max_tokens=20,
            sampling=replace(kind, seed=kind.seed + index),
            lane=lane,
        )
        for index, (kind, lane, length) in enumerate(zip(kinds, lanes, lengths, strict=True))
    ]


def make_configs(
    source: Path, *, expert: int, layout: str, lookahead: int = 0, spare: int = 0, kernels: str = "auto"
) -> list[RankConfig]:
    parallel = ParallelConfig(expert=expert, layout=layout, spare_experts=spare, rebalance_steps=6)
    limits = replace(LIMITS, lookahead=lookahead)
    return [
        replace(
            make_rank_config(source.parent, rank=rank, parallel=parallel, source=str(source), limits=limits),
            kernels=kernels,
        )
        for rank in range(expert)
    ]


def answer(config: RankConfig, collectives: Collectives, requests: list[GenerationRequest]) -> Answers:
    runner = ModelRunner.build(config, collectives, lambda stage, done, total: None)
    runner.warmup()
    if any(POISON_ID in request.prompt_ids for request in requests):
        with torch.inference_mode():
            runner.decoder._embedding_VH[POISON_ID] = torch.nan
    num_lanes = config.parallel.num_lanes
    shape = replace(shape_of(runner), eos_token_ids=())
    scheduler = Scheduler(config.limits, shape, num_lanes=num_lanes)
    engine = Engine(runner, scheduler, lookahead=config.limits.lookahead, clock=lambda: 0)
    for request in requests:
        engine.submit(replace(request, lane=request.lane % num_lanes))
    answers = Answers()
    while engine.has_work:
        deltas = engine.step().deltas
        answers.loads.append(runner.experts.loads())
        for delta in deltas:
            answers.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            answers.logprobs.setdefault(delta.request_id, []).extend(delta.logprobs)
            answers.scores.setdefault(delta.request_id, []).extend(delta.prompt_logprobs)
            if delta.finish is not None:
                answers.last[delta.request_id] = delta
    return answers


def answer_in_group(configs: list[RankConfig], requests: list[GenerationRequest]) -> Answers:
    """What rank 0 answers; all others must say the same."""
    first, *others = run_rank_threads(configs, lambda config, ranks: answer(config, ranks, requests))
    assert isinstance(first, Answers), first
    for other in others:
        assert isinstance(other, Answers), other
        assert (other.tokens, other.logprobs) == (first.tokens, first.logprobs)
        assert other.scores == first.scores
        assert other.loads == first.loads
    return first


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("expert", [2, 4])
def test_lanes_answer_as_one_rank_does(granite_moe: Path, expert: int, lookahead: int) -> None:
    """Greedy and seeded draws, penalties and logprobs; chunks, preemption, a lane without work."""
    alone = answer_in_group(make_configs(granite_moe, expert=1, layout="shared"), make_requests())
    configs = make_configs(granite_moe, expert=expert, layout="dispatch", lookahead=lookahead)
    together = answer_in_group(configs, make_requests())
    assert together.tokens == alone.tokens
    assert {delta.finish for delta in together.last.values()} == {FinishReason.LENGTH}
    timings = [delta.timing for delta in together.last.values()]
    assert sum(timing.preemptions for timing in timings if timing) > 0
    for request_id, wanted in alone.logprobs.items():
        for ours, theirs in zip(together.logprobs[request_id], wanted, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=LOGPROB_ERROR)
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


@pytest.mark.parametrize("expert", [2, 4])
def test_prompts_are_scored_in_any_lane(granite_moe: Path, expert: int) -> None:
    """Beside prompts that are not, and with more alternatives in one lane than in the other."""
    plain = make_requests()
    kinds = {
        request.request_id: SamplingParams(num_logprobs=count)
        for request, count in zip((plain[1], plain[2], plain[5]), (0, 2, 4), strict=True)
    }
    requests = [
        replace(request, sampling=kinds[request.request_id], scores_prompt=True)
        if request.request_id in kinds
        else request
        for request in plain
    ]
    alone = answer_in_group(make_configs(granite_moe, expert=1, layout="shared"), requests)
    together = answer_in_group(make_configs(granite_moe, expert=expert, layout="dispatch"), requests)
    assert together.tokens == alone.tokens
    for request in requests:
        ours, theirs = together.scores[request.request_id], alone.scores[request.request_id]
        assert len(ours) == (len(request.prompt_ids) - 1 if request.scores_prompt else 0)
        for our, their in zip(ours, theirs, strict=True):
            assert our.logprob == pytest.approx(their.logprob, abs=LOGPROB_ERROR)
            assert [token for token, _ in our.top] == [token for token, _ in their.top]


@pytest.mark.parametrize(
    ("expert", "layout", "kernels", "quantization"),
    [
        (2, "dispatch", "auto", "none"),
        (2, "dispatch", "auto", "int8"),
        (2, "dispatch", "off", "none"),
        (4, "dispatch", "auto", "none"),
        (2, "shared", "auto", "none"),
        (2, "shared", "off", "none"),
    ],
)
def test_copies_of_hot_experts_come_and_go_and_change_no_token(
    granite_moe: Path, expert: int, layout: str, kernels: str, quantization: str
) -> None:
    """Copies are made while sequences decode; every rank serves some of the tokens of a copied expert."""
    one = make_configs(granite_moe, expert=1, layout="shared")
    several = make_configs(granite_moe, expert=expert, layout=layout, spare=2, kernels=kernels)
    alone, together = (
        answer_in_group([replace(config, quantization=quantization) for config in configs], make_requests())
        for configs in (one, several)
    )
    assert together.tokens == alone.tokens
    placements = [loads.spares for loads in together.loads]
    assert set(placements[0]) == {EMPTY_SLOT}
    assert len(set(placements)) > 2, "copies were revised"
    for before, after in pairwise(placements):
        assert (
            before == after
            or before[: len(before) // 2] == after[: len(after) // 2]
            or (before[len(before) // 2 :] == after[len(after) // 2 :])
        ), "a step revises one layer"


def test_a_broken_row_fails_alone_in_any_lane(granite_moe: Path) -> None:
    """Its tokens go to the experts with those of all lanes; whoever gets its blocks finds them clean."""
    requests = make_requests()
    poisoned = [
        GenerationRequest(request_id=100 + lane, prompt_ids=(POISON_ID,) * 9, max_tokens=5, lane=lane)
        for lane in (0, 1)
    ]
    configs = make_configs(granite_moe, expert=2, layout="dispatch")
    wanted, got = answer_in_group(configs, requests), answer_in_group(configs, [*poisoned, *requests])
    assert all(POISON_ID not in tokens for tokens in wanted.tokens.values())
    for request in poisoned:
        assert got.last[request.request_id].error == ("INTERNAL", "the model's output was not finite")
    assert {request.request_id: got.tokens[request.request_id] for request in requests} == wanted.tokens
