"""Prefix caching through scheduler and engine: what is found, what is never found, and who pays for what."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from replicas.config import EngineLimits, NullEngineConfig
from replicas.engine.engine import Engine
from replicas.engine.prefix_hash import extend_hashes
from replicas.engine.scheduler import Scheduler
from replicas.plan import NewRow, PendingStep, StepOutcome, StepPlan
from replicas.rank.null_runner import NullRunner, null_continuation
from replicas.request import FinishReason, GenerationRequest, SamplingParams, SequenceDelta, StepMember

CONFIG = NullEngineConfig(step_ms=0.0, prefill_tokens_per_s=0.0, vocab_size=1000, context_tokens=256)
BLOCK_TOKENS = 4


@dataclass(slots=True)
class Answer:
    tokens: tuple[int, ...] = ()
    last: SequenceDelta | None = None
    members: list[StepMember] = field(default_factory=list)

    @property
    def cached_tokens(self) -> int:
        assert self.last is not None and self.last.timing is not None
        return self.last.timing.cached_tokens


@dataclass(frozen=True, slots=True)
class Done:
    outcome: StepOutcome

    def result(self) -> StepOutcome:
        return self.outcome


@dataclass(slots=True)
class PoisonedRunner:
    """The null runner, but the logits of a step that sees token 666 are not finite."""

    inner: NullRunner

    def launch(self, plan: StepPlan) -> PendingStep:
        ids = self.inner.launch(plan).result().sampled_ids
        sampling = [row for row in plan.rows if row.samples]
        bad = [666 in row.token_ids for row in sampling]
        return Done(
            StepOutcome(
                sampled_ids=tuple(-1 if is_bad else each for each, is_bad in zip(ids, bad, strict=True))
            )
        )

    def close(self) -> None:
        self.inner.close()


class Bench:
    """An engine, and the answers it gave. One step is a millisecond."""

    def __init__(
        self, *, num_blocks: int = 100, step_tokens: int = 64, lookahead: int = 0, prefix_caching: bool = True
    ) -> None:
        limits = EngineLimits(
            max_sequences=8,
            step_tokens=step_tokens,
            block_tokens=BLOCK_TOKENS,
            num_blocks=num_blocks,
            lookahead=lookahead,
            prefix_caching=prefix_caching,
        )
        runner = NullRunner(CONFIG, limits)
        self.engine = Engine(
            PoisonedRunner(runner), Scheduler(limits, runner.shape), lookahead=lookahead, clock=lambda: 0
        )
        self.answers: dict[int, Answer] = {}

    def submit(
        self, prompt_ids: tuple[int, ...], *, max_tokens: int = 3, salt: bytes = b"", priority: int = 0
    ) -> Answer:
        request_id = len(self.answers) + 1
        self.answers[request_id] = Answer()
        self.engine.submit(
            GenerationRequest(
                request_id=request_id,
                prompt_ids=prompt_ids,
                max_tokens=max_tokens,
                cache_salt=salt,
                priority=priority,
            )
        )
        return self.answers[request_id]

    def step(self) -> None:
        result = self.engine.step()
        for delta in result.deltas:
            answer = self.answers[delta.request_id]
            answer.tokens += delta.token_ids
            answer.last = delta if delta.finish else answer.last
        for member in result.record.members if result.record else ():
            self.answers[member.request_id].members.append(member)

    def run(self) -> None:
        while self.engine.has_work:
            self.step()
        load = self.engine.load
        assert load.free_blocks == load.total_blocks

    def ask(self, prompt_ids: tuple[int, ...], *, max_tokens: int = 3, salt: bytes = b"") -> Answer:
        answer = self.submit(prompt_ids, max_tokens=max_tokens, salt=salt)
        self.run()
        return answer


PROMPT = tuple(range(10, 23))  # Three full blocks and a token.


def test_a_prompt_seen_before_is_read_and_not_computed() -> None:
    bench = Bench()
    first, second = bench.ask(PROMPT), bench.ask(PROMPT)
    assert first.tokens == second.tokens == null_continuation(PROMPT, 3, CONFIG)
    assert (first.cached_tokens, second.cached_tokens) == (0, 12)
    assert second.members[0] == StepMember(request_id=2, new_tokens=1, context_tokens=12, is_prefill=True)
    load = bench.engine.load
    assert (load.prompt_tokens_total, load.cached_tokens_total) == (26, 12)


def test_at_least_one_token_of_a_prompt_is_computed() -> None:
    bench = Bench()
    bench.ask(PROMPT)
    assert bench.ask(PROMPT[:12]).cached_tokens == 8


def test_only_what_is_the_same_from_the_beginning_on_is_shared() -> None:
    bench = Bench()
    bench.ask(PROMPT)
    assert bench.ask((*PROMPT[:8], 99, *PROMPT[9:])).cached_tokens == 8
    assert bench.ask((99, *PROMPT[1:])).cached_tokens == 0
    assert bench.ask(PROMPT[4:]).cached_tokens == 0


def test_an_answer_is_cached_for_the_next_turn_of_a_conversation() -> None:
    bench = Bench()
    answer = bench.ask(PROMPT, max_tokens=9)
    # The last token was never computed, and the block before it is not full.
    assert bench.ask((*PROMPT, *answer.tokens, 7, 8)).cached_tokens == 20


def test_salts_do_not_see_each_other() -> None:
    bench = Bench()
    assert bench.ask(PROMPT, salt=b"one").cached_tokens == 0
    assert bench.ask(PROMPT, salt=b"two").cached_tokens == 0
    assert bench.ask(PROMPT, salt=b"one").cached_tokens == 12


def test_without_prefix_caching_nothing_is_found() -> None:
    bench = Bench(prefix_caching=False)
    assert [bench.ask(PROMPT).cached_tokens for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_least_recently_used_is_evicted_and_the_end_of_a_prompt_before_its_beginning(
    lookahead: int,
) -> None:
    bench = Bench(num_blocks=10, lookahead=lookahead)
    bench.ask(PROMPT)
    other = tuple(range(40, 53))
    bench.ask(other)
    bench.ask(tuple(range(70, 83)))  # Four of nine blocks; six are cached, of which the older must go.
    assert bench.ask(PROMPT[:9]).cached_tokens == 8
    assert bench.ask(PROMPT).cached_tokens == 8


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_preempted_sequence_finds_its_own_blocks(lookahead: int) -> None:
    bench = Bench(num_blocks=9, lookahead=lookahead)
    low = bench.submit(PROMPT, max_tokens=12)
    for _ in range(4):
        bench.step()
    high_prompt = tuple(range(50, 66))
    high = bench.submit(high_prompt, max_tokens=1, priority=1)
    bench.run()
    assert low.last is not None and low.last.timing is not None
    assert low.last.timing.preemptions == 1
    assert low.tokens == null_continuation(PROMPT, 12, CONFIG)
    assert high.tokens == null_continuation(high_prompt, 1, CONFIG)
    # Sixteen tokens were computed and are in full blocks; only what lookahead computed on top is repeated.
    resumed = [member for member in low.members if member.wasted_tokens]
    assert [(member.context_tokens, member.wasted_tokens) for member in resumed] == [(16, 1)] * lookahead
    assert low.cached_tokens == 0


@pytest.mark.parametrize("step_tokens", [5, 64])
def test_a_broken_row_leaves_nothing_in_the_cache(step_tokens: int) -> None:
    bench = Bench(step_tokens=step_tokens)
    bench.ask(PROMPT)
    poisoned = (*PROMPT[:8], 90, 91, 92, 93, 94, 95, 96, 97, 666)
    broken = bench.ask(poisoned)
    assert broken.last is not None and broken.last.finish is FinishReason.ERROR
    assert broken.cached_tokens == 8
    assert bench.ask(poisoned[:-1]).cached_tokens == 0


def test_what_is_shared_is_needed_once_and_admits_more() -> None:
    """Nine blocks: each sequence takes five, of which four are the same."""
    bench = Bench(num_blocks=10)
    prompt = tuple(range(10, 29))
    bench.ask(prompt, max_tokens=1)
    answers = [bench.submit((*prompt[:16], tail, 7), max_tokens=4) for tail in (3, 4, 5)]
    bench.step()
    assert bench.engine.load.running == (3,)
    bench.run()
    assert [answer.cached_tokens for answer in answers] == [16, 16, 16]
    for tail, answer in zip((3, 4, 5), answers, strict=True):
        assert answer.tokens == null_continuation((*prompt[:16], tail, 7), 4, CONFIG)


def test_a_row_with_penalties_brings_its_whole_history_and_a_plain_one_none() -> None:
    """After a failover the end of the prompt is answer; cached tokens are in no row of the plan."""
    limits = EngineLimits(max_sequences=8, block_tokens=BLOCK_TOKENS, num_blocks=50)
    scheduler = Scheduler(limits, NullRunner(CONFIG, limits).shape)
    penalised = SamplingParams(presence_penalty=1.0)
    new_rows: list[NewRow] = []
    start_pos = []
    for request_id, sampling in ((1, SamplingParams()), (2, penalised)):
        scheduler.submit(
            GenerationRequest(
                request_id=request_id, prompt_ids=PROMPT, max_tokens=2, sampling=sampling, first_offset=3
            ),
            now_ns=0,
        )
        step = scheduler.schedule(now_ns=0)
        assert step is not None
        scheduler.commit(step, StepOutcome(sampled_ids=(7,) * len(step.rows)), now_ns=0)
        new_rows += step.plan.new_rows
        start_pos.append(step.plan.rows[-1].start_pos)
    assert start_pos == [0, 12]
    assert new_rows == [
        NewRow(row=0, sampling=SamplingParams()),
        NewRow(row=1, sampling=penalised, history=PROMPT, num_prompt=10),
    ]


def test_hashes_depend_on_every_token_before_and_on_the_salt() -> None:
    hashes: list[bytes] = []
    extend_hashes(hashes, list(range(11)), block_tokens=4, salt=b"s")
    assert len(hashes) == 2 and all(len(each) == 16 for each in hashes)
    grown = hashes[:1]
    extend_hashes(grown, list(range(12)), block_tokens=4, salt=b"s")
    assert grown[:2] == hashes and len(grown) == 3
    for tokens, salt in (([9, *range(1, 11)], b"s"), (list(range(11)), b"t")):
        others: list[bytes] = []
        extend_hashes(others, tokens, block_tokens=4, salt=salt)
        assert not set(others) & set(hashes)
