"""Requests that arrive together and begin the same: computed once, by whoever came first."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from replicas.config import EngineLimits, NullEngineConfig
from replicas.engine.engine import Engine
from replicas.engine.prefix_leaders import num_shared_blocks
from replicas.engine.scheduler import Scheduler
from replicas.engine.sequence import Sequence
from replicas.plan import PendingStep, StepOutcome, StepPlan
from replicas.rank.null_runner import NullRunner, null_continuation
from replicas.request import FinishReason, GenerationRequest, StepMember

CONFIG = NullEngineConfig(step_ms=0.0, prefill_tokens_per_s=0.0, vocab_size=1000, context_tokens=512)
BLOCK_TOKENS = 4
PREFIX = tuple(range(100, 228))
NUM_TOKENS = 3
MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Done:
    outcome: StepOutcome

    def result(self) -> StepOutcome:
        return self.outcome


@dataclass(slots=True)
class PoisonedRunner:
    """The null runner, but logits behind token 666 are not finite."""

    inner: NullRunner

    def launch(self, plan: StepPlan) -> PendingStep:
        ids = self.inner.launch(plan).result().sampled_ids
        rows = [row for row in plan.rows if row.samples]
        said = [-1 if 666 in row.token_ids else each for row, each in zip(rows, ids, strict=True)]
        return Done(StepOutcome(sampled_ids=tuple(said)))

    def close(self) -> None:
        self.inner.close()


@dataclass(slots=True)
class Life:
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    work: list[StepMember] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @property
    def num_prefilled(self) -> int:
        return sum(member.new_tokens for member in self.work if member.is_prefill)


class Bench:
    """An engine whose clock stands still unless told."""

    def __init__(self, *, step_tokens: int = 64, lookahead: int = 0, max_sequences: int = 8) -> None:
        limits = EngineLimits(
            max_sequences=max_sequences,
            step_tokens=step_tokens,
            block_tokens=BLOCK_TOKENS,
            num_blocks=400,
            lookahead=lookahead,
        )
        runner = NullRunner(CONFIG, limits)
        self.now_ns = 0
        self.scheduler = Scheduler(limits, runner.shape)
        self.engine = Engine(
            PoisonedRunner(runner), self.scheduler, lookahead=lookahead, clock=lambda: self.now_ns
        )
        self.lives: dict[int, Life] = {}

    def submit(
        self, *tail: int, prefix: tuple[int, ...] = PREFIX, salt: bytes = b"", priority: int = 0, ms: int = 0
    ) -> Life:
        """`ms` is its deadline; 0: none."""
        request_id = len(self.lives) + 1
        self.lives[request_id] = Life()
        self.engine.submit(
            GenerationRequest(
                request_id=request_id,
                prompt_ids=(*prefix, *tail),
                max_tokens=NUM_TOKENS,
                cache_salt=salt,
                priority=priority,
                deadline_ns=ms * MS if ms else None,
            )
        )
        return self.lives[request_id]

    def step(self) -> None:
        result = self.engine.step()
        for delta in result.deltas:
            self.lives[delta.request_id].tokens += delta.token_ids
            self.lives[delta.request_id].finish = delta.finish
        for member in result.record.members if result.record else ():
            self.lives[member.request_id].work.append(member)
            self.lives[member.request_id].steps.append(result.step)
        self.scheduler.check()

    def run(self) -> None:
        while self.engine.has_work:
            self.step()


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("step_tokens", [16, 64, 512])
def test_a_shared_beginning_is_computed_once(step_tokens: int, lookahead: int) -> None:
    bench = Bench(step_tokens=step_tokens, lookahead=lookahead)
    lives = [bench.submit(300 + index, 400) for index in range(8)]
    bench.run()
    assert [life.num_prefilled for life in lives] == [130] + [2] * 7
    for index, life in enumerate(lives):
        assert life.tokens == null_continuation((*PREFIX, 300 + index, 400), NUM_TOKENS, CONFIG)


def test_who_begins_otherwise_or_for_another_tenant_does_not_wait() -> None:
    bench = Bench(step_tokens=512)
    leader, held = bench.submit(300), bench.submit(301)
    stranger = bench.submit(302, prefix=tuple(range(500, 532)))
    tenant = bench.submit(303, salt=b"other")
    short = bench.submit(304, prefix=PREFIX[:20])
    bench.run()
    first = [life.steps[0] for life in (leader, stranger, tenant, short)]
    assert len(set(first)) == 1
    assert held.steps[0] == first[0] + 1


def test_who_matters_more_does_not_wait_for_who_matters_less() -> None:
    bench = Bench(step_tokens=64)
    leader = bench.submit(300)
    bench.step()
    urgent, equal = bench.submit(301, priority=1), bench.submit(302)
    bench.run()
    assert urgent.num_prefilled == leader.num_prefilled == 129
    assert equal.num_prefilled == 1


def test_who_overtakes_leaves_a_row_to_who_waits() -> None:
    bench = Bench(step_tokens=512, max_sequences=2)
    bench.submit(300)
    held = bench.submit(301)
    stranger = bench.submit(302, prefix=tuple(range(500, 600)))
    bench.run()
    assert held.steps[0] < stranger.steps[0]


def test_the_next_one_computes_when_its_leader_is_cancelled() -> None:
    bench = Bench(step_tokens=32)
    leader, held = bench.submit(300), bench.submit(301)
    bench.step()
    bench.engine.cancel(1)
    bench.run()
    assert leader.finish is FinishReason.CANCELLED
    assert held.tokens == null_continuation((*PREFIX, 301), NUM_TOKENS, CONFIG)


def test_a_poisoned_leader_fails_alone() -> None:
    bench = Bench(step_tokens=512)
    leader, held = bench.submit(666), bench.submit(301)
    bench.run()
    assert leader.finish is FinishReason.ERROR
    assert held.num_prefilled == 129
    assert held.tokens == null_continuation((*PREFIX, 301), NUM_TOKENS, CONFIG)


def test_a_deadline_counts_while_waiting_for_a_leader() -> None:
    bench = Bench(step_tokens=16)
    leader, held = bench.submit(300), bench.submit(301, ms=5)
    bench.step()
    bench.now_ns = 6 * MS
    bench.run()
    assert (leader.finish, held.finish) == (FinishReason.LENGTH, FinishReason.DEADLINE)
    assert not held.work


def test_shared_blocks_are_counted_up_to_the_first_difference() -> None:
    def sequence(hashes: list[bytes]) -> Sequence:
        made = Sequence(
            request=GenerationRequest(request_id=1, prompt_ids=(1,), max_tokens=1),
            order=(0, 0),
            submitted_ns=0,
            context_tokens=9,
        )
        made.block_hashes = hashes
        return made

    one, other = sequence([b"a", b"b", b"c", b"d"]), sequence([b"a", b"b", b"x", b"y"])
    assert num_shared_blocks(one, other, limit=9) == 2
    assert num_shared_blocks(one, other, limit=1) == 1
    assert num_shared_blocks(one, sequence([]), limit=9) == 0
    assert num_shared_blocks(one, one, limit=9) == 4
