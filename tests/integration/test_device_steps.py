"""Steps as a device runs them give what a CPU gives, on static buffers, one step ahead, under pressure.

The device here is the host: the same uploads, tables, padded graphs and late reads, without a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replicas.config import EngineLimits
from replicas.rank.device_steps import DeviceSupport
from replicas.rank.graphs import EagerBackend
from replicas.rank.transfer import HostTransfer
from replicas.request import FinishReason, GenerationRequest, SamplingParams
from tests.checkpoints import make_granite, make_granite_moe, make_llama
from tests.engine_answers import Answers, answer, make_runner

LIMITS = EngineLimits(max_sequences=6, step_tokens=32, block_tokens=8, num_blocks=60, context_tokens=128)
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.3),
    SamplingParams(num_logprobs=2),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=20, seed=7),
    SamplingParams(logit_bias=((7, 3.0), (400, -2.0))),
    SamplingParams(temperature=0.9, min_p=0.05, seed=9, num_logprobs=0),
)


def make_requests() -> list[GenerationRequest]:
    """Twelve prompts of many lengths, most of which begin the same, with every kind of sampling."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 500, (length,), generator=generator).tolist())

    beginning = draw(40)
    prompts = [beginning + draw(length) for length in (1, 7, 14, 30, 2, 9)] + [
        draw(length) for length in (1, 2, 33, 5, 17, 8)
    ]
    return [
        GenerationRequest(
            request_id=index,
            prompt_ids=prompt,
            max_tokens=10 + 3 * (index % 4),
            sampling=SAMPLINGS[index % len(SAMPLINGS)],
        )
        for index, prompt in enumerate(prompts)
    ]


def with_stops(requests: list[GenerationRequest], answers: Answers) -> list[GenerationRequest]:
    """Every second request ends at a token that it is known to give after a few others."""
    return [
        replace(request, stop_token_ids=frozenset({answers.tokens[request.request_id][4]}))
        if request.request_id % 2
        else request
        for request in requests
    ]


def check_same(ours: Answers, wanted: Answers) -> None:
    assert ours.tokens == wanted.tokens
    assert ours.finishes == wanted.finishes
    for request_id, said in wanted.logprobs.items():
        assert len(ours.logprobs[request_id]) == len(said)
        for our, their in zip(ours.logprobs[request_id], said, strict=True):
            assert our.logprob == pytest.approx(their.logprob, abs=1e-4)
            assert [token_id for token_id, _ in our.top] == [token_id for token_id, _ in their.top]


SUPPORTS = {
    "host": None,
    "eager": DeviceSupport(transfer=HostTransfer(), graphs=None),
    "graphs": DeviceSupport(transfer=HostTransfer(), graphs=EagerBackend()),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": make_llama(root / "llama", seed=10),
        "granite": make_granite(root / "granite", seed=2),
        "granite-moe": make_granite_moe(root / "granite-moe", vocab_size=515, seed=13),
    }


def run(source: Path, limits: EngineLimits, support: str, requests: list[GenerationRequest]) -> Answers:
    runner = make_runner(source, limits, SUPPORTS[support])
    runner.warmup()
    answers = answer(runner, limits, requests)
    runner.close()
    return answers


@pytest.mark.parametrize("name", ["llama", "granite", "granite-moe"])
def test_a_device_gives_the_tokens_of_the_host(sources: dict[str, Path], name: str) -> None:
    wanted = run(sources[name], LIMITS, "host", make_requests())
    requests = with_stops(make_requests(), wanted)
    wanted = run(sources[name], LIMITS, "host", requests)
    assert FinishReason.STOP in wanted.finishes.values()
    for support, lookahead in (("host", 1), ("eager", 1), ("graphs", 0), ("graphs", 1)):
        ours = run(sources[name], replace(LIMITS, lookahead=lookahead), support, requests)
        check_same(ours, wanted)
        assert (sum(ours.experts_hit) > 0) == (name == "granite-moe")


@pytest.mark.parametrize("support", ["host", "graphs"])
def test_looking_ahead_changes_no_token_when_blocks_run_out(sources: dict[str, Path], support: str) -> None:
    tight = replace(LIMITS, num_blocks=16, lookahead=1)
    wanted = run(sources["llama"], LIMITS, "host", make_requests())
    ours = run(sources["llama"], tight, support, make_requests())
    check_same(ours, wanted)
    assert ours.num_preemptions > 0
    assert wanted.num_cached > 0 and ours.num_cached > 0


def test_tokens_computed_past_the_end_are_counted_as_wasted(sources: dict[str, Path]) -> None:
    wanted = run(sources["llama"], LIMITS, "host", make_requests())
    requests = with_stops(make_requests(), wanted)
    behind = run(sources["llama"], LIMITS, "graphs", requests)
    ahead = run(sources["llama"], replace(LIMITS, lookahead=1), "graphs", requests)
    num_stopped = list(ahead.finishes.values()).count(FinishReason.STOP)
    assert behind.num_wasted == 0
    assert ahead.num_wasted == num_stopped > 0
    assert sum(member.wasted_tokens for member in ahead.members) == ahead.num_wasted


def test_without_a_prefix_cache_the_tokens_are_the_same(sources: dict[str, Path]) -> None:
    limits = replace(LIMITS, lookahead=1)
    with_cache = run(sources["llama"], limits, "graphs", make_requests())
    without = run(sources["llama"], replace(limits, prefix_caching=False), "graphs", make_requests())
    check_same(without, with_cache)
    assert (with_cache.num_cached > 0, without.num_cached) == (True, 0)


def test_a_poisoned_request_fails_alone_one_step_ahead(sources: dict[str, Path]) -> None:
    """Its blocks go to others, who find nothing of it there."""
    limits = replace(LIMITS, num_blocks=24, lookahead=1)
    wanted = run(sources["llama"], limits, "host", make_requests())
    poison = next(
        token
        for token in range(3, 500)
        if not any(
            token in (*request.prompt_ids, *wanted.tokens[request.request_id]) for request in make_requests()
        )
    )
    poisoned = GenerationRequest(request_id=99, prompt_ids=(poison,) * 9, max_tokens=8)
    runner = make_runner(sources["llama"], limits, SUPPORTS["graphs"])
    with torch.inference_mode():
        runner.decoder._embedding_VH[poison] = torch.nan
    ours = answer(runner, limits, [poisoned, *make_requests()])
    assert ours.last.pop(99).finish is FinishReason.ERROR
    assert ours.tokens.pop(99) == []
    check_same(ours, wanted)
