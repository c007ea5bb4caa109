"""One attached replica: its state, its load, and the requests this router has there.

Lives on the event loop. `server.py` feeds it what the replica says and sends what it queues.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from cluster.balancing.lane_view import LaneView
from cluster.balancing.step_fit import StepFit
from cluster.energy.account import EnergyAccount
from cluster.link.detokenize_worker import DetokenizeWorker, StreamNews, StreamTokens
from cluster.link.engine_job import EngineJob
from cluster.link.fleet_record import Stand, Standing
from cluster.link.messages import parse_end, parse_energy, submit_command
from cluster.link.reader_pace import ReaderPace
from cluster.link.token_stream import TokenStream
from cluster.request.errors import EngineFault, Overloaded, ReplicaStopped
from cluster.request.failover import LossReason, ReplicaIdentity
from protos import wattline_link_pb2 as link
from replicas.expert_heat import ExpertHeat
from replicas.strict_messages import MalformedMessage
from replicas.supervisor.step_watch import StepWatch
from replicas.wire.deltas import logprobs_from_wire, timing_from_wire
from replicas.wire.steps import columns_from_wire

logger = logging.getLogger(__name__)

STALL_S = 2.0
"""Without a word for this long a replica gets no new work: its heartbeat comes several times a second."""
MAX_OUTGOING = 4096
"""Commands waiting for a replica that does not read them."""
NEVER_SEEN = 2**63
"""The snapshot number of a request that is not submitted yet."""
MAX_OPEN_ACCOUNTS = 8192
"""Requests whose final joules are awaited; beyond it the oldest stays at what is known."""

LINK_ENDED = Standing(stand=Stand.LOST, reason="its link ended without a word")


class ReplicaState(Enum):
    READY = auto()
    DRAINING = auto()
    STALLED = auto()


@dataclass(frozen=True, slots=True)
class UnseenJob:
    """A submitted request that the load snapshots may not count yet."""

    snapshot_count: int
    prefill_tokens: int
    lane: int


class ReplicaConnection:
    """Mutable; owned by one Attach call."""

    def __init__(
        self,
        *,
        hello: link.Hello,
        epoch: int,
        max_waiting: int,
        freeze_s: float,
        worker: DetokenizeWorker,
        pace: ReaderPace,
        clock_s: Callable[[], float],
    ) -> None:
        self.hello = hello
        self.agent_metrics_addresses: tuple[str, ...] = ()
        """Of the energy agents of its hosts, its own host's first; an empty one shows none."""
        self.epoch = epoch
        self.load = hello.load
        self.experts: ExpertHeat | None = None
        self.attached_at_s = clock_s()
        self.commands: asyncio.Queue[link.ToReplica] = asyncio.Queue(maxsize=MAX_OUTGOING)
        """What goes down."""
        self.closed = asyncio.Event()
        self.dropped_deltas = 0
        self.num_unproven = 0
        """Requests of any router that it may have died of, as it says itself; 0: it does not."""
        self._max_waiting = max_waiting
        self._worker = worker
        self._pace = pace
        self._clock_s = clock_s
        self._load_at_s = self.attached_at_s
        self._snapshot_count = 0
        self._step_fit = StepFit()
        self._watch = StepWatch(floor_s=freeze_s)
        self._silence = StepWatch(floor_s=STALL_S)
        self._fenced_why = ""
        self._draining_why: str | None = None
        self._end: Standing | None = None
        self._last_link_id = 0
        self._last_hold = 0
        self._streams: dict[int, TokenStream] = {}
        self._unseen: dict[int, UnseenJob] = {}
        self._accounts: dict[int, EnergyAccount] = {}

    @property
    def replica_id(self) -> str:
        return self.hello.replica_id

    @property
    def state(self) -> ReplicaState:
        if self._draining_why is not None and not self.closed.is_set():
            return ReplicaState.DRAINING
        is_stalled = self.is_silent or bool(self._fenced_why) or self.closed.is_set()
        return ReplicaState.STALLED if is_stalled else ReplicaState.READY

    @property
    def standing(self) -> Standing:
        """The same for operators: finer, and with the reason."""
        if self._end is not None:
            return self._end
        if self._draining_why is not None:
            return Standing(stand=Stand.DRAINING, reason=self._draining_why)
        if self._fenced_why:
            return Standing(stand=Stand.FROZEN, reason=self._fenced_why)
        if self.is_silent:
            return Standing(stand=Stand.SILENT, reason=f"nothing heard for {STALL_S:g} s")
        return Standing(stand=Stand.READY)

    @property
    def identity(self) -> ReplicaIdentity:
        """What another replica must have in common with it to take over its streams."""
        return ReplicaIdentity(
            model=self.hello.model,
            weights_digest=self.hello.weights_digest,
            tokenizer_digest=self.hello.tokenizer_digest,
        )

    @property
    def is_silent(self) -> bool:
        """Whether nothing came for so long that the link may be dead. While nobody listened is no silence."""
        return self._silence.waited_s > STALL_S

    @property
    def in_flight(self) -> int:
        """Requests of this router that the engine has not ended."""
        return len(self._streams)

    def lane_views(self) -> list[LaneView]:
        """What the balancer compares: one entry per lane."""
        age_s = self._clock_s() - self._load_at_s
        return [self._lane_view(lane, age_s) for lane in range(max(1, self.hello.lanes))]

    def submit(self, job: EngineJob) -> tuple[TokenStream, EnergyAccount]:
        """Send a request down. The caller must `release` the stream, whatever happens.

        Raises Overloaded if the replica does not take commands, ReplicaStopped if it is gone.
        """
        if self.closed.is_set():
            raise ReplicaStopped(LossReason.REFUSED)
        self._last_link_id += 1
        stream = TokenStream(
            link_id=self._last_link_id,
            attempt=job.attempt,
            first_offset=job.first_offset,
            text=job.text,
            buffer_bytes=job.buffer_bytes,
            on_overflow=job.on_overflow,
            pace=self._pace,
            clock_s=self._clock_s,
        )
        try:
            self.commands.put_nowait(submit_command(job, request_id=stream.link_id))
        except asyncio.QueueFull:
            stream.abandon()
            raise Overloaded("the replica does not take commands", retry_after_ms=250) from None
        account = EnergyAccount()
        self._streams[stream.link_id] = stream
        self._unseen[stream.link_id] = UnseenJob(
            self._snapshot_count, len(job.prompt_ids) - job.cached_tokens, job.lane
        )
        self._open_account(stream.link_id, account)
        return stream, account

    def hold(self, lane: int, *, prefill_tokens: int) -> int:
        """Count a request that will be submitted in a moment. Drop the hold when it is, or will not be."""
        self._last_hold -= 1
        self._unseen[self._last_hold] = UnseenJob(NEVER_SEEN, prefill_tokens, lane)
        return self._last_hold

    def drop_hold(self, hold: int) -> None:
        self._unseen.pop(hold, None)

    def stop(self, stream: TokenStream) -> None:
        """The answer is complete: let the engine finish it now, if it has not."""
        if stream.link_id in self._streams:
            self._send(link.ToReplica(stop=link.Stop(request_id=stream.link_id)))

    def release(self, stream: TokenStream) -> None:
        """Nobody reads the stream any more: cancel it, if the engine has not ended it."""
        stream.abandon()
        if self._streams.pop(stream.link_id, None) is not None:
            self._unseen.pop(stream.link_id, None)
            self._send(link.ToReplica(cancel=link.Cancel(request_id=stream.link_id)))

    def drain(self, reason: str) -> None:
        """Stop new work here and tell the replica; streams under way finish."""
        self.mark_draining(reason)
        self._send(link.ToReplica(drain=link.Drain(reason=reason)))

    def heard(self) -> None:
        """A message came: the replica lives."""
        self._silence.note_step(None)
        self._fenced_why = ""
        self._watch.note_step(self.load.step_ms / 1e3)

    def check_progress(self) -> None:
        """Call it several times a second: a replica with work that says nothing for too long is fenced.

        A gap of this process's own does not count: the watch adds little per call, however late it comes.
        """
        now_s = self._clock_s()
        self._silence.tick(now_s, has_work=True)
        self._watch.tick(now_s, has_work=bool(self._streams))
        if self._watch.is_stalled:
            logger.warning("replica_fenced id=%s streams=%d", self.replica_id, len(self._streams))
            self._fence()

    def mark_draining(self, reason: str) -> None:
        """It takes no new work from now on. The first reason stays."""
        if self._draining_why is None:
            self._draining_why = reason

    def take_load(self, load: link.LoadSnapshot) -> None:
        """A newer snapshot. It may have crossed a submission; the one after it cannot have."""
        self.load = load
        self._load_at_s = self._clock_s()
        self._snapshot_count += 1
        if load.step_ms and any(load.running):
            self._step_fit.add(num_running=sum(load.running), step_ms=load.step_ms)
        if self._unseen:
            seen = [
                key for key, job in self._unseen.items() if self._snapshot_count - job.snapshot_count >= 2
            ]
            for key in seen:
                del self._unseen[key]

    def take_step(self, step: link.StepOutput) -> int:
        """Hand the tokens of one engine step on to their streams. Returns how many there were.

        Raises MalformedMessage where its columns do not fit together.
        """
        try:
            runs = list(columns_from_wire(step.tokens).runs())
        except ValueError as error:
            raise MalformedMessage from error
        batch_size = max(len(runs) + len(step.deltas), sum(step.load.running))
        entries: list[StreamTokens] = []
        for request_id, attempt, first_offset, token_ids in runs:
            stream = self._stream_of(request_id, attempt)
            if stream is not None:
                entries += self._take(stream, first_offset, (token_ids, (), None), batch_size)
        for delta in step.deltas:
            stream = self._stream_of(delta.request_id, delta.attempt)
            if stream is None:
                continue
            if delta.prompt_logprobs:
                stream.prompt_logprobs = logprobs_from_wire(delta.prompt_logprobs)
            logprobs = logprobs_from_wire(delta.logprobs) if delta.logprobs else ()
            stream.timing = timing_from_wire(delta)
            end = parse_end(delta) if delta.finish else None
            news = (tuple(delta.token_ids), logprobs, end)
            entries += self._take(stream, delta.first_offset, news, batch_size)
        if entries:
            # Each reader's message takes its time: who has none yet comes first, the others hardly notice.
            entries.sort(key=lambda entry: entry[0].first_token_s is not None)
            self._worker.submit(entries)
        if step.HasField("load"):
            self.take_load(step.load)
        return sum([len(token_ids) for _, token_ids, _, _ in entries])

    def take_energy(self, report: link.EnergyReport) -> None:
        """Newer joules for requests of this router; final ones close their account."""
        for entry in report.requests:
            account = self._accounts.get(entry.request_id)
            if account is None:
                continue
            energy = parse_energy(entry)
            if energy is None:
                account.settle()
            else:
                account.update(energy)
            if account.is_settled:
                del self._accounts[entry.request_id]

    def take_goodbye(self, goodbye: link.Goodbye) -> None:
        """The replica leaves. One that drained has done nothing wrong; any other has lost its group."""
        self.num_unproven = goodbye.num_unproven
        if goodbye.is_lost or self._draining_why is None:
            self.close(LossReason.FAILED, Standing(stand=Stand.LOST, reason=goodbye.reason))
        else:
            self.close(LossReason.DRAINED, Standing(stand=Stand.DRAINED, reason=self._draining_why))

    def close(self, reason: LossReason = LossReason.KILLED, end: Standing = LINK_ENDED) -> None:
        """The link is gone: every stream fails, every account stays at what is known. Safe to call twice."""
        if self.closed.is_set():
            return
        self._end = end
        self.closed.set()
        self._lose_streams(reason)
        accounts, self._accounts = self._accounts, {}
        for account in accounts.values():
            account.settle()
        self._unseen.clear()

    def _send(self, command: link.ToReplica) -> None:
        if self.closed.is_set():
            return
        try:
            self.commands.put_nowait(command)
        except asyncio.QueueFull:
            # A cancel must not be lost: a replica that does not read is as good as gone.
            logger.error("link_overflow replica=%s commands=%d", self.replica_id, MAX_OUTGOING)
            self.close()

    def _fence(self) -> None:
        """Take every stream away. What the replica still says of them, should it wake up, finds none."""
        if not self._fenced_why:
            self._fenced_why = f"silent for {self._watch.waited_s:.1f} s with {len(self._streams)} in flight"
        link_ids = tuple(self._streams)
        self._lose_streams(LossReason.FROZEN)
        for link_id in link_ids:
            self._send(link.ToReplica(cancel=link.Cancel(request_id=link_id)))

    def _lose_streams(self, reason: LossReason) -> None:
        streams, self._streams = self._streams, {}
        if streams:
            # Through the worker, so that tokens which came before are delivered before.
            self._worker.submit([(stream, (), (), ReplicaStopped(reason)) for stream in streams.values()])

    def _stream_of(self, link_id: int, attempt: int) -> TokenStream | None:
        """None, and counted: what comes for a stream that is over, or of an attempt that is."""
        stream = self._streams.get(link_id)
        if stream is not None and stream.attempt == attempt:
            return stream
        self.dropped_deltas += 1
        return None

    def _take(
        self, stream: TokenStream, first_offset: int, news: StreamNews, batch_size: int
    ) -> tuple[StreamTokens, ...]:
        """What its text is made of: nothing of a duplicate, and an end where tokens are missing."""
        token_ids, logprobs, end = news
        if token_ids and first_offset != stream.next_offset:
            self.dropped_deltas += 1
            if first_offset < stream.next_offset and end is None:
                return ()
            logger.error("link_tokens_lost replica=%s offset=%d", self.replica_id, first_offset)
            self._send(link.ToReplica(cancel=link.Cancel(request_id=stream.link_id)))
            token_ids, logprobs, end = (), (), EngineFault("tokens of this answer were lost on the way")
        if token_ids:
            stream.next_offset += len(token_ids)
            stream.batches.add(batch_size)
        self._unseen.pop(stream.link_id, None)
        if end is not None:
            self._streams.pop(stream.link_id, None)  # Gone already where the cancel found no room.
        return ((stream, token_ids, logprobs, end),)

    def _open_account(self, link_id: int, account: EnergyAccount) -> None:
        self._accounts[link_id] = account
        if len(self._accounts) > MAX_OPEN_ACCOUNTS:
            self._accounts.pop(next(iter(self._accounts))).settle()

    def _lane_view(self, lane: int, age_s: float) -> LaneView:
        unseen = [job for job in self._unseen.values() if job.lane == lane]
        load = self.load
        return LaneView(
            replica_id=self.replica_id,
            lane=lane,
            running=_of_lane(load.running, lane),
            waiting=_of_lane(load.waiting, lane),
            waiting_prefill_tokens=_of_lane(load.waiting_prefill_tokens, lane),
            unseen_requests=len(unseen),
            unseen_prefill_tokens=sum(job.prefill_tokens for job in unseen),
            in_flight=self.in_flight,
            max_sequences=self.hello.max_sequences,
            max_waiting=self._max_waiting,
            free_kv_tokens=_of_lane(load.free_blocks, lane) * self.hello.block_tokens,
            snapshot_age_s=age_s,
            step_ms=load.step_ms,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            step_ms_per_sequence=self._step_fit.ms_per_sequence,
            idle_power_w=load.idle_power_w,
            active_power_w=load.active_power_w,
            attached_age_s=self._clock_s() - self.attached_at_s,
        )


def _of_lane(values: Sequence[int], lane: int) -> int:
    return values[lane] if lane < len(values) else 0
