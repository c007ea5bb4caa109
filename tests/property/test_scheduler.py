"""Random lives of requests through scheduler, engine and null runner, in pools too small for them.

The null runner reads its cache through the block tables, so a lost, shared or early reused block shows as a
wrong token. Tokens are compared with what the sequence alone determines. Prompts often begin the same, under
one of two salts; behind every step stands a copy of the cache, in which each row must find the whole of its
sequence, write to no block of another row, and find nothing of the other salt. Lanes share no blocks. What a
sequence says of its steps at its end is what was seen of it, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replicas.config import EngineLimits, NullEngineConfig
from replicas.engine.engine import Engine
from replicas.engine.prefill_pace import PrefillPace
from replicas.engine.prefix_leaders import MIN_SHARED_TOKENS
from replicas.engine.scheduler import Scheduler
from replicas.plan import LAST_SAMPLED, PendingStep, PlannedRow, StepPlan, decode_plan, encode_plan
from replicas.rank.null_runner import EOS_TOKEN_ID, NullRunner, null_continuation
from replicas.request import (
    FinishReason,
    GenerationRequest,
    SequenceDelta,
    StepMember,
    StepRecord,
    StepResult,
)
from replicas.step_trail import StepTrail, TokenGap

BLOCK_TOKENS = 4
MAX_WAITING = 6
TICK_NS = 1_000
NS_PER_US = 1_000
CONFIG = NullEngineConfig(
    step_ms=0.0, prefill_tokens_per_s=0.0, vocab_size=50, context_tokens=60, eos_every=25
)


@dataclass(slots=True)
class TickingClock:
    now_ns: int = 0

    def __call__(self) -> int:
        self.now_ns += TICK_NS
        return self.now_ns


@dataclass(slots=True)
class WatchedRunner:
    """The null runner behind the plan codec, checking what every plan promises."""

    inner: NullRunner
    limits: EngineLimits
    num_lanes: int
    live_rows: set[int] = field(default_factory=set)
    last_step: int = 0
    tables: dict[int, list[int]] = field(default_factory=dict)
    sequences: dict[int, list[int]] = field(default_factory=dict)
    """Per row, the tokens of its sequence as far as this row wrote or sampled them."""
    cache: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)
    """Per lane and block, what is written where in it."""

    def launch(self, plan: StepPlan) -> PendingStep:
        assert plan.step == self.last_step + 1
        self.last_step = plan.step
        lanes = [self.lane_of(row.row) for row in plan.rows]
        assert lanes and lanes == sorted(lanes)
        for lane in range(self.num_lanes):
            mine = [row for row in plan.rows if self.lane_of(row.row) == lane]
            assert sum(len(row.token_ids) for row in mine) <= self.limits.step_tokens
        self.live_rows -= set(plan.freed_rows)
        new_rows = {new.row for new in plan.new_rows}
        assert len(new_rows) == len(plan.new_rows) and not new_rows & self.live_rows
        self.live_rows |= new_rows
        rows = [row.row for row in plan.rows]
        assert len(set(rows)) == len(rows) and set(rows) <= self.live_rows
        assert self.live_rows <= set(range(self.num_lanes * self.limits.max_sequences))
        for row in (*plan.freed_rows, *new_rows):
            self.tables[row], self.sequences[row] = [], []
        for planned in plan.rows:
            self.write(planned)
        pending = self.inner.launch(decode_plan(encode_plan(plan)))
        for planned, token_id in zip(
            (planned for planned in plan.rows if planned.samples), pending.result().sampled_ids, strict=True
        ):
            self.sequences[planned.row].append(token_id)
        return pending

    def write(self, planned: PlannedRow) -> None:
        """As a runner does; what the row did not write itself, it takes from the blocks it was given."""
        lane, table, sequence = (
            self.lane_of(planned.row),
            self.tables[planned.row],
            self.sequences[planned.row],
        )
        table += planned.new_blocks
        for pos in range(len(sequence), planned.start_pos):
            sequence.append(self.cache[lane, table[pos // BLOCK_TOKENS]][pos % BLOCK_TOKENS])
        others = {
            block
            for row, blocks in self.tables.items()
            if row != planned.row and self.lane_of(row) == lane
            for block in blocks
        }
        for pos, token_id in enumerate(planned.token_ids, planned.start_pos):
            block = table[pos // BLOCK_TOKENS]
            assert block not in others, "a shared block is never written"
            if pos == len(sequence):
                sequence.append(token_id)
            assert token_id in (LAST_SAMPLED, sequence[pos])
            self.cache.setdefault((lane, block), {})[pos % BLOCK_TOKENS] = sequence[pos]
        for pos in range(planned.start_pos):
            assert self.cache[lane, table[pos // BLOCK_TOKENS]][pos % BLOCK_TOKENS] == sequence[pos]

    def lane_of(self, row: int) -> int:
        return row // self.limits.max_sequences

    def close(self) -> None:
        self.inner.close()


@dataclass(slots=True)
class Life:
    """What one request asked for and has got so far."""

    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    last: SequenceDelta | None = None
    has_started: bool = False
    num_computed: int = 0
    cached_tokens: int = 0
    wasted_tokens: int = 0
    steps: list[int] = field(default_factory=list)
    """Those it was in while it lived."""
    token_ends: list[tuple[int, int]] = field(default_factory=list)
    """Of each token: its step, and when that was done."""
    allowed: set[FinishReason] = field(default_factory=lambda: {FinishReason.STOP, FinishReason.LENGTH})


class SchedulerMachine(RuleBasedStateMachine):
    """Submits, cancels, stops, lets deadlines pass and steps, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.lives: dict[int, Life] = {}
        self.newest_started: dict[tuple[int, int], int] = {}
        self.open(7, 8, 3, 0)

    @initialize(
        num_blocks=st.one_of(st.integers(3, 16), st.integers(40, 80)),
        step_tokens=st.integers(1, 24),
        max_sequences=st.integers(1, 5),
        lookahead=st.integers(0, 1),
        prefix_caching=st.booleans(),
        stretch=st.one_of(st.none(), st.floats(1.0, 3.0)),
        num_lanes=st.sampled_from([1, 1, 2, 3]),
    )
    def open(
        self,
        num_blocks: int,
        step_tokens: int,
        max_sequences: int,
        lookahead: int,
        prefix_caching: bool = True,
        stretch: float | None = None,
        num_lanes: int = 1,
    ) -> None:
        limits = EngineLimits(
            max_sequences=max_sequences,
            max_waiting=MAX_WAITING,
            step_tokens=step_tokens,
            block_tokens=BLOCK_TOKENS,
            num_blocks=num_blocks,
            lookahead=lookahead,
            prefix_caching=prefix_caching,
        )
        self.max_sequences = max_sequences
        self.prefix_caching = prefix_caching
        self.num_lanes = num_lanes
        runner = NullRunner(CONFIG, limits, num_lanes=num_lanes)
        self.clock = TickingClock()
        self.scheduler = Scheduler(limits, runner.shape, num_lanes=num_lanes)
        self.engine = Engine(
            WatchedRunner(runner, limits, num_lanes),
            self.scheduler,
            lookahead=lookahead,
            pace=None if stretch is None else PrefillPace(stretch=stretch, is_packing=False),
            clock=self.clock,
        )

    @rule(
        num_prompt=st.one_of(st.integers(1, 40), st.integers(34, 42)),
        first_token=st.integers(3, 8),
        max_tokens=st.integers(1, 30),
        priority=st.integers(0, 2),
        ticks_left=st.one_of(st.none(), st.integers(1, 200)),
        salt=st.sampled_from([b"", b"", b"a"]),
        lane=st.integers(0, 2),
    )
    def submit(
        self,
        num_prompt: int,
        first_token: int,
        max_tokens: int,
        priority: int,
        ticks_left: int | None,
        salt: bytes,
        lane: int,
    ) -> None:
        request = GenerationRequest(
            request_id=len(self.lives) + 1,
            prompt_ids=tuple(range(first_token, first_token + num_prompt)),
            max_tokens=max_tokens,
            stop_token_ids=frozenset({EOS_TOKEN_ID}),
            priority=priority,
            deadline_ns=None if ticks_left is None else self.clock.now_ns + ticks_left * TICK_NS,
            cache_salt=salt,
            lane=lane % self.num_lanes,
        )
        life = self.lives[request.request_id] = Life(request=request)
        if ticks_left is not None:
            life.allowed.add(FinishReason.DEADLINE)
        load = self.engine.load
        num_held = load.running[request.lane] + load.waiting[request.lane]
        if num_prompt >= self.scheduler.context_tokens or num_held >= self.max_sequences + MAX_WAITING:
            life.allowed = {FinishReason.ERROR}
        self.engine.submit(request)

    @precondition(lambda self: self.lives)
    @rule(pick=st.integers(0))
    def cancel(self, pick: int) -> None:
        life = self.lives[pick % len(self.lives) + 1]
        life.allowed.add(FinishReason.CANCELLED)
        self.engine.cancel(life.request.request_id)

    @precondition(lambda self: self.lives)
    @rule(pick=st.integers(0))
    def stop(self, pick: int) -> None:
        self.engine.stop(self.lives[pick % len(self.lives) + 1].request.request_id)

    @precondition(lambda self: self.engine.has_work)
    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.engine.has_work:
                self.run_step()

    @rule(ticks=st.integers(1, 100))
    def wait(self, ticks: int) -> None:
        self.clock.now_ns += ticks * TICK_NS

    @invariant()
    def queues_rows_and_blocks_agree(self) -> None:
        self.scheduler.check()

    def teardown(self) -> None:
        """Everything accepted ends, exactly once, within a number of steps that rules out starvation."""
        for _ in range(200 * (len(self.lives) + 1)):
            if not self.engine.has_work:
                break
            self.run_step()
        assert not self.engine.has_work, "requests starve"
        load = self.engine.load
        assert load.free_blocks == load.total_blocks
        for life in self.lives.values():
            assert life.last is not None and life.last.finish in life.allowed
            self.check_answer(life)

    def run_step(self) -> None:
        before_ns = self.clock.now_ns
        self.take(self.engine.step())
        for life in self.lives.values():
            deadline_ns = life.request.deadline_ns
            assert life.last is not None or deadline_ns is None or deadline_ns > before_ns

    def take(self, result: StepResult) -> None:
        if result.record:
            self.follow(result.record, {delta.request_id: delta for delta in result.deltas})
        for delta in result.deltas:
            life = self.lives[delta.request_id]
            assert life.last is None, "nothing follows the last delta"
            assert not delta.token_ids or delta.first_offset == len(life.tokens)
            life.tokens += delta.token_ids
            if delta.finish is not None:
                life.last = delta
        members = result.record.members if result.record else ()
        turns = [(self.lives[member.request_id].request.lane, member.is_prefill) for member in members]
        assert turns == sorted(turns), "lane by lane, and within a lane decodes first"
        for member in members:
            life = self.lives[member.request_id]
            self.check_turn(life, member)
            self.check_work(life, member)

    def follow(self, record: StepRecord, deltas: dict[int, SequenceDelta]) -> None:
        """Who ends without a token had ended before the step was done."""
        for member in record.members:
            life, delta = self.lives[member.request_id], deltas.get(member.request_id)
            if life.last is not None or (delta is not None and not delta.token_ids):
                continue
            life.steps.append(record.step)
            if delta is not None:
                life.token_ends.append((record.step, record.end_ns))

    def check_turn(self, life: Life, member: StepMember) -> None:
        """Among equals, whoever came first starts first; what it need not compute is in the cache."""
        if not life.has_started:
            life.has_started = True
            life.cached_tokens = member.context_tokens
            assert life.cached_tokens < len(life.request.prompt_ids)
            assert life.cached_tokens % BLOCK_TOKENS == 0
            assert self.prefix_caching or life.cached_tokens == 0
            request = life.request
            turn = (request.lane, request.priority)
            newest = self.newest_started.get(turn, 0)
            assert newest < request.request_id or self.could_share(life)
            self.newest_started[turn] = max(newest, request.request_id)

    def could_share(self, life: Life) -> bool:
        """Overtaken is only who begins as one does that started before it, and matters no less."""
        return any(
            other.has_started
            and other is not life
            and other.request.lane == life.request.lane
            and other.request.priority >= life.request.priority
            and other.request.cache_salt == life.request.cache_salt
            and other.request.prompt_ids[:MIN_SHARED_TOKENS] == life.request.prompt_ids[:MIN_SHARED_TOKENS]
            for other in self.lives.values()
        )

    def check_work(self, life: Life, member: StepMember) -> None:
        """Wasted is what was computed before, or all once the request has ended; none is past the end."""
        end = member.context_tokens + member.new_tokens
        repeated = max(min(life.num_computed, end) - member.context_tokens, 0)
        assert member.wasted_tokens == repeated or (life.last and member.wasted_tokens == member.new_tokens)
        assert end < min(
            len(life.request.prompt_ids) + life.request.max_tokens, self.scheduler.context_tokens
        )
        life.num_computed = max(life.num_computed, end)
        life.wasted_tokens += member.wasted_tokens

    def check_answer(self, life: Life) -> None:
        assert life.last is not None and life.last.timing is not None
        assert life.last.timing.wasted_tokens == life.wasted_tokens
        assert life.last.timing.cached_tokens == life.cached_tokens
        assert life.last.timing.trail == seen_trail(life)
        request = life.request
        room = min(request.max_tokens, self.scheduler.context_tokens - len(request.prompt_ids))
        expected = null_continuation(request.prompt_ids, max(room, 0), CONFIG)
        if EOS_TOKEN_ID in expected:
            expected = expected[: expected.index(EOS_TOKEN_ID) + 1]
        assert tuple(life.tokens) == expected[: len(life.tokens)]
        if life.last.finish is FinishReason.LENGTH:
            assert tuple(life.tokens) == expected and EOS_TOKEN_ID not in expected


def seen_trail(life: Life) -> StepTrail | None:
    """By the record of all its steps and tokens."""
    if not life.steps:
        return None
    first_token_step, first_ns = life.token_ends[0] if life.token_ends else (None, 0)
    num_prefills = sum(first_token_step is None or step <= first_token_step for step in life.steps)
    gaps = [
        TokenGap(
            duration_us=(end_ns - before_ns) // NS_PER_US, end_us=(end_ns - first_ns) // NS_PER_US, step=step
        )
        for (_, before_ns), (step, end_ns) in pairwise(life.token_ends)
    ]
    return StepTrail(
        first_step=life.steps[0],
        first_token_step=first_token_step,
        last_step=life.steps[-1],
        num_prefill_steps=num_prefills,
        num_decode_steps=len(life.steps) - num_prefills,
        longest_gap=max(gaps, key=lambda gap: gap.duration_us, default=None),
    )


SchedulerMachine.TestCase.settings = settings(
    max_examples=150,
    derandomize=True,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestScheduler = SchedulerMachine.TestCase
