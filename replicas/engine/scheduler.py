"""Decides what the next step computes, and what its outcome means for every sequence.

Continuous batching: each step takes one token of every decoding sequence first, then fills the token budget
of each lane with prefill chunks, oldest of the highest priority first. When a decoding sequence finds no free
block, the newest sequence of the lowest priority in its lane gives up its blocks and is computed again
later; the oldest therefore always advances, and since a request alone in its lane fits, all of them end.
Lanes share steps and nothing else: each has its own blocks, queue, token budget and `max_sequences` rows.

A step may be planned while the one before is under way (`EngineLimits.lookahead`): tokens not known yet are
placeholders, and a row that turns out to have ended discards its overrun token as wasted.
Pure: no clock, no torch, no protobuf. Called by the engine alone, from one thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, repeat

from replicas.config import EngineLimits
from replicas.engine.lane import Lane
from replicas.engine.prefill_pace import PrefillPace
from replicas.engine.request_check import check_request
from replicas.engine.scheduled_step import ScheduledRow, ScheduledStep, plan_row, take_scores
from replicas.engine.sequence import Sequence, SequenceState
from replicas.engine.trail import StepEnd
from replicas.errors import BadRequest
from replicas.plan import EngineShape, NewRow, StepOutcome, StepPlan
from replicas.request import (
    CacheChange,
    FinishReason,
    GenerationRequest,
    LoadSnapshot,
    SequenceDelta,
    StepMember,
    TokenLogprobs,
)

MAX_SCORED_TOKENS = 256
"""Of prompts that are scored, per step and lane: each takes a row of logits over the whole vocabulary."""
NO_TOKEN = -1
"""A runner's answer for a row whose logits were not finite."""


class Scheduler:
    """Owns every live sequence, the lanes, the rows of the batch, and the deltas not yet taken."""

    def __init__(self, limits: EngineLimits, shape: EngineShape, *, num_lanes: int = 1) -> None:
        self._limits = limits
        self._shape = shape
        self._lanes = tuple(
            Lane(
                rows=range(lane * limits.max_sequences, (lane + 1) * limits.max_sequences),
                num_blocks=shape.num_blocks,
                block_tokens=limits.block_tokens,
                caches_prefixes=limits.prefix_caching,
            )
            for lane in range(num_lanes)
        )
        self.context_tokens = min(
            shape.context_tokens,
            limits.context_tokens or shape.context_tokens,
            self._lanes[0].capacity_tokens,
        )
        """The most tokens, prompt and output, of one sequence; as many as fit when it is alone."""
        self._sequences: dict[int, Sequence] = {}
        self._freed_rows: list[int] = []
        self._deltas: list[SequenceDelta] = []
        self._num_arrived = 0
        self._next_deadline_ns: float = math.inf
        self._step = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._deltas)

    @property
    def is_idle(self) -> bool:
        """No sequence lives; deltas may still wait to be taken."""
        return not self._sequences

    @property
    def num_decoding(self) -> int:
        return sum([len(lane.running) - len(lane.prefilling) for lane in self._lanes])

    @property
    def num_prefilling(self) -> int:
        """Sequences that have prompt tokens left to plan, waiting ones included."""
        return sum([len(lane.prefilling) + len(lane.waiting) for lane in self._lanes])

    @property
    def step(self) -> int:
        """Number of the step planned last; 0 before the first."""
        return self._step

    def submit(self, request: GenerationRequest, *, now_ns: int) -> None:
        """Queue a request. One that can never run, or finds the queue full, ends with an ERROR delta."""
        assert request.request_id not in self._sequences, "request ids are unique in the group's life"
        try:
            check_request(
                request,
                vocab_size=self._shape.vocab_size,
                context_tokens=self.context_tokens,
                num_lanes=len(self._lanes),
                scores_prompts=self._shape.scores_prompts,
            )
        except BadRequest as error:
            self._refuse(request, ("INVALID_ARGUMENT", str(error)))
            return
        # Waiting ones for whom a row is free do not count: a burst between two steps fills the rows too.
        lane = self._lanes[request.lane]
        num_queued = lane.num_sequences - lane.num_rows
        if num_queued >= self._limits.max_waiting:
            self._refuse(request, ("RESOURCE_EXHAUSTED", f"{num_queued} requests wait already; retry later"))
            return
        sequence = Sequence(
            request=request,
            order=(-request.priority, self._num_arrived),
            submitted_ns=now_ns,
            context_tokens=self.context_tokens,
        )
        self._num_arrived += 1
        self._sequences[request.request_id] = sequence
        lane.enqueue(sequence)
        if request.deadline_ns is not None:
            self._next_deadline_ns = min(self._next_deadline_ns, request.deadline_ns)

    def cancel(self, request_id: int, *, now_ns: int) -> None:
        """End with CANCELLED, whatever the state; an id that has already ended is no error."""
        self._end(request_id, FinishReason.CANCELLED, now_ns)

    def stop(self, request_id: int, *, now_ns: int) -> None:
        """End with STOP, whatever the state; an id that has already ended is no error."""
        self._end(request_id, FinishReason.STOP, now_ns)

    def schedule(self, *, now_ns: int, pace: PrefillPace | None = None) -> ScheduledStep | None:
        """Plan the next step; None when no sequence can compute anything now. `pace` bounds prompt tokens."""
        if now_ns >= self._next_deadline_ns:
            self._expire(now_ns)
        rows: list[ScheduledRow] = []
        new_rows: list[NewRow] = []
        num_filling = sum([bool(lane.prefilling or lane.waiting) for lane in self._lanes]) or 1
        for lane in self._lanes:
            self._preempt_for_priority(lane)
            room = self._prompt_room(self._schedule_decodes(lane, rows), pace, num_filling)
            candidates = chain(tuple(lane.prefilling), self._admit(lane, new_rows, now_ns))
            self._schedule_prefills(lane, rows, candidates, room)
        if not rows:
            return None
        self._step += 1
        scored = tuple([row for row in rows if row.is_prefill and row.sequence.is_scoring])
        plan = StepPlan(
            step=self._step,
            freed_rows=tuple(self._freed_rows),
            new_rows=tuple(new_rows),
            rows=tuple([row.planned for row in rows]),
            scored=tuple([row.sequence.scored_row(row.planned) for row in scored]),
        )
        self._freed_rows.clear()
        return ScheduledStep(plan=plan, rows=tuple(rows), scored=scored)

    def commit(self, step: ScheduledStep, outcome: StepOutcome, *, now_ns: int) -> tuple[StepMember, ...]:
        """Take in what the oldest step under way sampled; says who was in it, for the energy ledger."""
        sampled = zip(outcome.sampled_ids, outcome.logprobs or repeat(None), strict=False)
        if step.scored:
            take_scores(step, outcome)
        members = []
        end = StepEnd(step=step.plan.step, at_ns=now_ns)
        for row in step.rows:
            sequence, num_tokens = row.sequence, len(row.planned.token_ids)
            has_ended = sequence.state is SequenceState.FINISHED
            members.append(row.member())
            token = next(sampled) if row.planned.samples else None
            if has_ended:
                continue
            sequence.num_useful_in_flight -= num_tokens - row.repeated
            if token is None:
                sequence.trail.take_chunk(end.step)
            else:
                self._prove_computed(row, is_finite=token[0] != NO_TOKEN)
                self._take_token(sequence, *token, end)
        assert next(sampled, None) is None, "a runner samples the rows that ask for it, and no others"
        for lane in self._lanes:
            for sequence in lane.take_sharers_of_broken():
                self._preempt(lane, sequence)
        return tuple(members)

    def take_deltas(self) -> tuple[SequenceDelta, ...]:
        deltas, self._deltas = tuple(self._deltas), []
        return deltas

    def take_cache_changes(self) -> tuple[CacheChange, ...]:
        """What the prefix caches filed and let go since the last call; lanes without news are left out."""
        changes = [lane.take_cache_change(index) for index, lane in enumerate(self._lanes)]
        return tuple([change for change in changes if change is not None])

    def load(
        self, *, step_ms: float, prefill_tokens_per_s: float, decode_tokens_per_s: float
    ) -> LoadSnapshot:
        """The queues now, completed by rates that the engine measures."""
        lanes = self._lanes
        return LoadSnapshot(
            step=self._step,
            running=tuple([len(lane.running) for lane in lanes]),
            waiting=tuple([len(lane.waiting) for lane in lanes]),
            waiting_prefill_tokens=tuple([lane.num_prefill_tokens for lane in lanes]),
            free_blocks=tuple([lane.pool.num_free for lane in lanes]),
            total_blocks=tuple([lane.pool.num_total for lane in lanes]),
            step_ms=step_ms,
            prefill_tokens_per_s=prefill_tokens_per_s,
            decode_tokens_per_s=decode_tokens_per_s,
            prompt_tokens_total=self._num_prompt_tokens,
            generated_tokens_total=self._num_generated_tokens,
            cached_tokens_total=self._num_cached_tokens,
        )

    def check_idle(self) -> None:
        """Assert that nothing is held when nothing lives."""
        for lane in self._lanes:
            lane.check_idle()

    def check(self) -> None:
        """Assert that queues, rows and blocks agree, by a pass over all of them; for tests."""
        for lane in self._lanes:
            lane.check()
        num_queued = sum(lane.num_sequences for lane in self._lanes)
        assert num_queued == len(self._sequences), "a live sequence is in exactly one queue"

    def _prompt_room(self, free: int, pace: PrefillPace | None, num_lanes: int) -> tuple[int, int]:
        """Prompt tokens of one lane, and after how many it takes no further prompt: an even share of the
        step's, since lanes run side by side."""
        if pace is None:
            return free, free
        num_decoding = self.num_decoding
        tokens = pace.tokens(
            num_decoding=num_decoding, num_prefilling=self.num_prefilling, limit=free * num_lanes
        )
        packed = pace.packed_tokens(num_decoding=num_decoding, limit=tokens)
        return -(-tokens // num_lanes), -(-packed // num_lanes)

    def _schedule_decodes(self, lane: Lane, rows: list[ScheduledRow]) -> int:
        """One token of each decoding sequence; the budget that is left."""
        budget = self._limits.step_tokens
        for sequence in tuple(lane.running):
            if budget == 0:
                break
            # An earlier one may have taken this one's blocks.
            if (
                sequence.state is not SequenceState.RUNNING
                or not sequence.is_decoding
                or sequence.awaits_last
            ):
                continue
            if lane.needs_block(sequence) and not self._grow(lane, sequence):
                continue
            rows.append(plan_row(sequence, 1, is_prefill=False))
            budget -= 1
        return budget

    def _schedule_prefills(
        self, lane: Lane, rows: list[ScheduledRow], candidates: Iterator[Sequence], room: tuple[int, int]
    ) -> None:
        """Prompt chunks: of what runs already, then of what can be admitted."""
        budget, packed = room
        to_score, least_budget = MAX_SCORED_TOKENS, budget - packed
        while budget > least_budget and (sequence := next(candidates, None)) is not None:
            count = min(sequence.num_uncomputed, budget)
            if sequence.is_scoring:
                count = min(count, to_score)
                to_score -= count
                if count == 0:
                    continue
            rows.append(plan_row(sequence, count, is_prefill=True))
            lane.chunk_planned(sequence)
            budget -= count

    def _admit(self, lane: Lane, new_rows: list[NewRow], now_ns: int) -> Iterator[Sequence]:
        """In order: a long request at the head is not overtaken, so it cannot starve. Only who waits for a
        leader's blocks is passed by; a row and its own blocks are kept for it."""
        held: list[Sequence] = []
        while len(held) < min(len(lane.waiting), lane.num_free_rows):
            sequence = lane.waiting[len(held)]
            if lane.is_held(sequence):
                held.append(sequence)
                continue
            # Preempted while its token was under way: the token decides whether it goes on.
            if sequence.num_pending or not lane.has_blocks_for(sequence, besides=held):
                return
            lane.admit(sequence)
            new_rows.append(sequence.new_row())
            if sequence.scheduled_ns is None:
                sequence.scheduled_ns = now_ns
                self._num_prompt_tokens += len(sequence.request.prompt_ids)
                self._num_cached_tokens += sequence.cached_tokens
            yield sequence

    def _grow(self, lane: Lane, sequence: Sequence) -> bool:
        """A block for the next token, if need be from the least important. False: that was itself."""
        while lane.pool.num_free == 0:
            victim = lane.running[-1]
            self._preempt(lane, victim)
            if victim is sequence:
                return False
        lane.grow(sequence)
        return True

    def _preempt_for_priority(self, lane: Lane) -> None:
        """Make room for a waiting request that matters more than what runs."""
        if not lane.waiting or not lane.running:
            return
        head = lane.waiting[0]
        is_stuck = head.num_pending or lane.is_held(head)
        if not is_stuck and head.request.priority > lane.running[-1].request.priority:
            for victim in lane.victims_for(head):
                self._preempt(lane, victim)

    def _preempt(self, lane: Lane, sequence: Sequence) -> None:
        self._remove(lane, sequence)
        sequence.preempt()
        lane.enqueue(sequence)

    def _remove(self, lane: Lane, sequence: Sequence) -> None:
        if sequence.row is not None:
            self._freed_rows.append(sequence.row)
        lane.remove(sequence)

    def _prove_computed(self, row: ScheduledRow, *, is_finite: bool) -> None:
        """A sampled row has read the KV of its whole sequence: good for others, or for nobody.

        A sequence preempted meanwhile has left its blocks to others already.
        """
        sequence = row.sequence
        if sequence.state is not SequenceState.RUNNING:
            return
        lane = self._lanes[sequence.request.lane]
        if is_finite:
            lane.file_computed(sequence, num_tokens=row.planned.start_pos + len(row.planned.token_ids))
        else:
            lane.forget(sequence)

    def _take_token(
        self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, end: StepEnd
    ) -> None:
        if token_id == NO_TOKEN:
            sequence.trail.take_chunk(end.step)
            error = ("INTERNAL", "the model's output was not finite")
            self._finish(sequence, FinishReason.ERROR, end.at_ns, error=error)
            return
        finish = sequence.append(token_id, end)
        self._num_generated_tokens += 1
        said = () if logprobs is None else (logprobs,)
        if finish is None:
            self._deltas.append(sequence.token_delta(token_id, said))
        else:
            self._finish(sequence, finish, end.at_ns, token_ids=(token_id,), logprobs=said)

    def _end(self, request_id: int, finish: FinishReason, now_ns: int) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._finish(sequence, finish, now_ns)

    def _finish(
        self,
        sequence: Sequence,
        finish: FinishReason,
        now_ns: int,
        *,
        token_ids: tuple[int, ...] = (),
        error: tuple[str, str] | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """Blocks go back now; a step under way that still writes to them runs before whatever reuses them."""
        self._remove(self._lanes[sequence.request.lane], sequence)
        sequence.finish()
        del self._sequences[sequence.request.request_id]
        self._deltas.append(
            sequence.last_delta(token_ids, finish, now_ns=now_ns, error=error, logprobs=logprobs)
        )

    def _refuse(self, request: GenerationRequest, error: tuple[str, str]) -> None:
        sequence = Sequence(request=request, order=(0, 0), submitted_ns=0, context_tokens=0)
        self._deltas.append(sequence.last_delta((), FinishReason.ERROR, now_ns=0, error=error))

    def _expire(self, now_ns: int) -> None:
        """End what is past its deadline. A full pass, but only once the earliest deadline has come."""
        for sequence in list(self._sequences.values()):
            deadline_ns = sequence.request.deadline_ns
            if deadline_ns is not None and now_ns >= deadline_ns:
                self._finish(sequence, FinishReason.DEADLINE, now_ns)
        deadlines = (sequence.request.deadline_ns for sequence in self._sequences.values())
        self._next_deadline_ns = min((at for at in deadlines if at is not None), default=math.inf)
