"""Scored prompts: every token but the first, once, whatever the chunks, the cache, preemption or ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from replicas.config import EngineLimits, NullEngineConfig, ParallelConfig, RankConfig
from replicas.engine.engine import Engine
from replicas.engine.scheduler import MAX_SCORED_TOKENS, Scheduler
from replicas.parallel.collectives import Collectives
from replicas.plan import NO_NEXT, NewRow, PlannedRow, ScoredRow, StepPlan
from replicas.rank.null_runner import IMPOSSIBLE, NullRunner, null_continuation
from replicas.rank.runner import ModelRunner
from replicas.request import FinishReason, GenerationRequest, SamplingParams, SequenceDelta, TokenLogprobs
from tests.checkpoints import make_granite_moe, make_llama, reference_logits
from tests.rank_threads import make_rank_config, run_rank_threads

NULL = NullEngineConfig(step_ms=0.0, prefill_tokens_per_s=0.0, vocab_size=1000, context_tokens=2048)
SCORING = SamplingParams(num_logprobs=1)


def make_engine(*, step_tokens: int = 64, num_blocks: int = 400, lookahead: int = 0) -> Engine:
    limits = EngineLimits(
        max_sequences=8,
        step_tokens=step_tokens,
        block_tokens=4,
        num_blocks=num_blocks,
        lookahead=lookahead,
    )
    runner = NullRunner(NULL, limits)
    return Engine(runner, Scheduler(limits, runner.shape), lookahead=lookahead)


def make_request(
    request_id: int, prompt_ids: tuple[int, ...], *, max_tokens: int = 3, scores: bool = True
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        max_tokens=max_tokens,
        sampling=SCORING,
        scores_prompt=scores,
    )


def run(engine: Engine) -> dict[int, list[SequenceDelta]]:
    deltas: dict[int, list[SequenceDelta]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
    return deltas


def expected(prompt_ids: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
    """Half of the prompts here are what the null engine would have said itself."""
    said = [null_continuation(prompt_ids[:end], 1, NULL)[0] for end in range(1, len(prompt_ids))]
    return tuple(
        TokenLogprobs(logprob=0.0 if token_id == likely else IMPOSSIBLE, top=((likely, 0.0),))
        for token_id, likely in zip(prompt_ids[1:], said, strict=True)
    )


def make_prompt(first: int, length: int) -> tuple[int, ...]:
    start = (first, first + 1, first + 2)[:length]
    return start + null_continuation(start, length - len(start), NULL) if length > 3 else start


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("step_tokens", [3, 16, 512])
@pytest.mark.parametrize("num_blocks", [30, 400])
def test_a_prompt_is_scored_once_with_its_first_token(
    step_tokens: int, num_blocks: int, lookahead: int
) -> None:
    """With few blocks, sequences are preempted."""
    engine = make_engine(step_tokens=step_tokens, num_blocks=num_blocks, lookahead=lookahead)
    prompts = [make_prompt(3 + 10 * index, length) for index, length in enumerate((1, 2, 5, 17, 40, 8))]
    for request_id, prompt in enumerate(prompts):
        engine.submit(make_request(request_id, prompt, max_tokens=12, scores=request_id != 5))
    deltas = run(engine)
    for request_id, prompt in enumerate(prompts):
        first, *others = deltas[request_id]
        assert first.prompt_logprobs == (expected(prompt) if request_id != 5 else ())
        assert all(not delta.prompt_logprobs for delta in others)
        tokens = tuple(token_id for delta in deltas[request_id] for token_id in delta.token_ids)
        assert tokens == null_continuation(prompt, 12, NULL)


def test_a_cached_prompt_is_scored_all_the_same_and_cached_for_others() -> None:
    engine = make_engine()
    prompt = make_prompt(3, 40)
    for request_id, scores in enumerate((False, True, False)):
        engine.submit(make_request(request_id, prompt, scores=scores))
        deltas = run(engine)[request_id]
        assert deltas[0].prompt_logprobs == (expected(prompt) if scores else ())
        timing = deltas[-1].timing
        assert timing is not None and (timing.cached_tokens > 0) == (request_id == 2)


def test_few_tokens_of_a_step_are_scored_and_the_others_go_on() -> None:
    engine = make_engine(step_tokens=2000, num_blocks=2000)
    scored, plain = make_prompt(3, 2 * MAX_SCORED_TOKENS + 10), make_prompt(50, 600)
    engine.submit(make_request(1, scored))
    engine.submit(make_request(2, scored[:20]))
    engine.submit(make_request(3, plain, scores=False))
    record = engine.step().record
    assert record is not None
    assert [(member.request_id, member.new_tokens) for member in record.members] == [
        (1, MAX_SCORED_TOKENS),
        (3, 600),
    ]
    deltas = run(engine)
    assert deltas[1][0].prompt_logprobs == expected(scored)
    assert deltas[2][0].prompt_logprobs == expected(scored[:20])


@pytest.mark.parametrize("num_logprobs", [None, 6])
def test_what_cannot_be_scored_is_refused(num_logprobs: int | None) -> None:
    engine = make_engine()
    engine.submit(
        GenerationRequest(
            request_id=1,
            prompt_ids=(3, 4),
            max_tokens=1,
            sampling=SamplingParams(num_logprobs=num_logprobs),
            scores_prompt=True,
        )
    )
    ((delta,),) = run(engine).values()
    assert delta.finish is FinishReason.ERROR and delta.error is not None
    assert delta.error[1] == f"logprobs is {num_logprobs}; give 0 to 5 with prompt_logprobs"


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    "make", [make_llama, partial(make_granite_moe, vocab_size=499)], ids=["llama", "granite-moe"]
)
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_scores_are_those_of_transformers(
    tmp_path: Path, make: Callable[[Path], Path], num_ranks: int, kernels: str
) -> None:
    torch.set_num_threads(1)
    source = make(tmp_path / "model")
    token_ids = tuple(torch.randint(3, 499, (21,), generator=torch.Generator().manual_seed(4)).tolist())
    limits = EngineLimits(max_sequences=4, step_tokens=32, block_tokens=8, num_blocks=16, context_tokens=64)
    parallel = ParallelConfig(tensor=num_ranks)
    configs = [
        make_rank_config(tmp_path, rank=rank, parallel=parallel, source=str(source), limits=limits)
        for rank in range(num_ranks)
    ]

    def work(config: RankConfig, collectives: Collectives) -> tuple[TokenLogprobs, ...]:
        runner = ModelRunner.build(config, collectives, lambda stage, done, total: None)
        scores: list[TokenLogprobs] = []
        for step, (start, end) in enumerate(((0, 13), (13, 20), (20, 21)), 1):
            blocks = {0: (1, 2), 13: (3,), 20: ()}[start]
            chunk = PlannedRow(
                row=2,
                start_pos=start,
                token_ids=token_ids[start:end],
                new_blocks=blocks,
                samples=end == len(token_ids),
            )
            next_id = token_ids[end] if end < len(token_ids) else NO_NEXT
            plan = StepPlan(
                step=step,
                freed_rows=(),
                new_rows=(NewRow(row=2, sampling=SamplingParams(num_logprobs=2)),) if step == 1 else (),
                rows=(chunk,),
                scored=(ScoredRow(row=2, next_id=next_id),),
            )
            outcome = runner.launch(plan).result()
            assert len(outcome.sampled_ids) == chunk.samples
            scores += outcome.scores
        return tuple(scores)

    results = run_rank_threads(configs, work)
    assert not [result for result in results if isinstance(result, BaseException)], results
    assert all(result == results[0] for result in results)
    (scores, *_) = results
    assert isinstance(scores, tuple)
    (reference,) = reference_logits(source, [list(token_ids)])
    wanted = reference.log_softmax(dim=1)[:-1]
    said = torch.tensor([score.logprob for score in scores])
    assert torch.allclose(
        said, wanted.gather(1, torch.tensor(token_ids[1:]).unsqueeze(1)).squeeze(1), atol=1e-3
    )
    assert [score.top[0][0] for score in scores] == wanted.argmax(dim=1).tolist()
