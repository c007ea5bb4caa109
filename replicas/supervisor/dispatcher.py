"""Joins links and engine: commands down in the engine's numbering, deltas and energy up in the links'.

Synchronous, and on the step path: it fills outboxes and queues and waits for nothing. Owned by
`supervisor.py`; the links call it through `LinkHandler`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from replicas.energy.bill import RequestJoules, nothing_owed
from replicas.expert_heat import ExpertHeat
from replicas.frames import Cancel, Command, Stop, Submit
from replicas.link.link import LinkSession
from replicas.link.messages import (
    Drain,
    EnergyStatement,
    LedgerState,
    ReplicaCard,
    ReplicaLoad,
    RouterCommand,
)
from replicas.logged_traces import list_traces
from replicas.request import CacheChange, FinishReason, GenerationRequest, SequenceDelta
from replicas.step_report import StepReport, TokenRun
from replicas.supervisor.cache_mirror import CacheMirror
from replicas.supervisor.energy_account import EnergyAccount
from replicas.supervisor.in_flight import Flight, InFlight

logger = logging.getLogger(__name__)


class Dispatcher:
    """Who asked for what, and who gets it. One per group life.

    `send` puts a command into the engine's queue. `energy` is None where nothing meters the replica.
    """

    def __init__(
        self,
        *,
        card: ReplicaCard,
        send: Callable[[Command], None],
        energy: EnergyAccount | None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        limits = card.config.limits
        self.card = card
        self._send = send
        self._energy = energy
        self._clock = clock
        self._max_in_flight = card.engine.lanes * (limits.max_sequences + limits.max_waiting)
        self._load = card.engine.load
        self._mirror = CacheMirror()
        self._in_flight: InFlight[LinkSession] = InFlight()
        self._sessions: set[LinkSession] = set()
        self._draining: str | None = None
        self._is_fenced = False
        self.wasted_tokens = 0
        self.experts: ExpertHeat | None = None
        """How they were loaded of late, as the links tell it."""
        self.first_link = asyncio.Event()
        self.idle = asyncio.Event()
        """Set while the engine holds no request."""
        self.idle.set()
        self.billed = asyncio.Event()
        """Set while no ended request waits for its energy."""
        self.billed.set()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_unproven(self) -> int:
        """What its last word says to routers, should the group be lost."""
        return self._in_flight.num_unproven

    @property
    def traces(self) -> str:
        """Of the requests that somebody waits for, oldest first, for a log."""
        return list_traces(flight.trace_id for flight in self._in_flight.live())

    def trace_of(self, engine_id: int) -> str:
        """Of a request that the engine holds; empty: it has none, or the engine ended it."""
        return self._in_flight.trace_of(engine_id)

    @property
    def num_links(self) -> int:
        return len(self._sessions)

    @property
    def is_draining(self) -> bool:
        return self._draining is not None

    def load(self) -> ReplicaLoad:
        energy = self._energy
        if energy is None or energy.source is None:
            return ReplicaLoad(engine=self._load, experts=self.experts)
        return ReplicaLoad(
            engine=self._load,
            energy_source=energy.source.value,
            joules_per_token=energy.joules_per_token,
            power_w=energy.power_w,
            idle_power_w=energy.idle_power_w,
            active_power_w=energy.active_power_w,
            experts=self.experts,
        )

    def ledger(self) -> LedgerState | None:
        """None while no meter spoke."""
        energy = self._energy
        if energy is None or energy.source is None:
            return None
        return LedgerState(
            until_ns=energy.divided_until_ns,
            sums=energy.sums,
            agent_metrics_addresses=energy.agent_metrics_addresses,
        )

    def cache(self) -> tuple[CacheChange, ...]:
        return self._mirror.snapshot()

    # From the links.

    def on_attached(self, session: LinkSession) -> None:
        logger.info("link_attached router=%s target=%s", session.router_id, session.target)
        self._sessions.add(session)
        self.first_link.set()
        if self._draining is not None:
            session.outbox.add_draining(self._draining)

    def on_lost(self, session: LinkSession, reason: str) -> None:
        """Its router is gone: nobody waits for its requests any more."""
        self._sessions.discard(session)
        orphans = self._in_flight.drop_link(session)
        for engine_id in orphans:
            self._send(Cancel(request_id=engine_id))
        logger.info("link_lost router=%s cancelled=%d reason=%s", session.router_id, len(orphans), reason)

    def on_command(self, session: LinkSession, command: RouterCommand) -> None:
        match command:
            case Submit():
                self._submit(session, command.request)
            case Cancel():
                flight = self._in_flight.find(session, command.request_id)
                if flight is not None:
                    self._cancel(flight)
            case Stop():
                flight = self._in_flight.stop(session, command.request_id)
                if flight is not None:
                    self._send(Stop(request_id=flight.engine_id))
            case Drain():
                self.begin_drain(command.reason)

    # From the engine and the meter.

    def on_step(self, report: StepReport) -> None:
        if self._is_fenced:
            return
        self._load = report.load
        if report.cache:
            self._mirror.apply(report.cache)
            for session in self._sessions:
                session.outbox.cache.add(report.cache)
        if self._energy is not None:
            self._energy.add_step(report)
        if self._in_flight.num_unproven:
            self._note_proofs(report)
        self._deliver_tokens(report)
        ended = self._deliver_deltas(report) if report.deltas else []
        for flight in ended:
            self._report_provisional(flight)
        self.settle_energy()
        if not self._in_flight:
            self.idle.set()

    def settle_energy(self) -> None:
        """Send the bills that have closed. Call it whenever the ledger may have moved."""
        if self._energy is None:
            return
        for joules in self._energy.take_closed():
            flight = self._in_flight.settle(joules.request_id)
            if flight is not None:
                self._state_energy(flight, joules)
        for engine_id in self._energy.take_unmeasured():
            self._settle_unknown(engine_id)
        if not self._in_flight.num_unbilled:
            self.billed.set()

    def lose_meter(self) -> None:
        """There is no meter after all: energy is unknown from now on, and nothing waits for it."""
        self._energy = None
        for engine_id in self._in_flight.unbilled:
            self._settle_unknown(engine_id)
        self.billed.set()

    # From the supervisor.

    def begin_drain(self, reason: str) -> None:
        """Refuse what comes from now on, and tell every router. Idempotent."""
        if self._draining is not None:
            return
        logger.info("draining in_flight=%d reason=%s", self.num_in_flight, reason)
        self._draining = reason
        for session in self._sessions:
            session.outbox.add_draining(reason)

    def fence(self) -> None:
        """The group is lost: nothing it still says goes up."""
        self._is_fenced = True
        self.idle.set()

    def bill_unfinished(self) -> None:
        """Before Goodbye: what is known of the joules of every request that another replica will finish."""
        for flight in self._in_flight.live():
            self._report_provisional(flight)

    def _submit(self, session: LinkSession, request: GenerationRequest) -> None:
        refusal = self._refusal()
        if refusal is not None:
            self._refuse(session, request, *refusal)
            return
        live = self._in_flight.find(session, request.request_id)
        if live is not None:
            if request.attempt <= live.attempt:
                logger.warning("submit_ignored request=%d attempt=%d", request.request_id, request.attempt)
                return
            self._cancel(live)
        flight = self._in_flight.open(
            session,
            request_id=request.request_id,
            attempt=request.attempt,
            is_moved=request.attempt > 0 or request.first_offset > 0,
            trace_id=request.trace_id,
        )
        self.idle.clear()
        if self._energy is not None:
            self._energy.begin(flight.engine_id, payer=request.tenant)
        self._send(Submit(request=replace(request, request_id=flight.engine_id)))

    def _refuse(self, session: LinkSession, request: GenerationRequest, code: str, message: str) -> None:
        """The only delta of a request that is not taken, and its joules, which its router waits for, too."""
        session.outbox.add_deltas(self._load.step, (_refused(request, code, message),))
        source = None if self._energy is None else self._energy.source
        joules = None if source is None else nothing_owed(request.request_id, source=source)
        statement = EnergyStatement(request_id=request.request_id, attempt=request.attempt, joules=joules)
        session.outbox.add_energy((statement,))

    def _refusal(self) -> tuple[str, str] | None:
        """Status and text if no request can be taken now."""
        if self._draining is not None or self._is_fenced:
            return (
                "UNAVAILABLE",
                f"the replica takes no new requests: {self._draining or 'its group is lost'}",
            )
        if len(self._in_flight) >= self._max_in_flight:
            return (
                "RESOURCE_EXHAUSTED",
                f"the replica holds {self._max_in_flight} requests, its max_sequences + max_waiting per lane",
            )
        return None

    def _cancel(self, flight: Flight[LinkSession]) -> None:
        self._in_flight.mute(flight)
        self._send(Cancel(request_id=flight.engine_id))

    def _note_proofs(self, report: StepReport) -> None:
        for engine_id, _, _, token_ids in report.tokens.runs():
            self._in_flight.note_tokens(engine_id, len(token_ids))
        for delta in report.deltas:
            self._in_flight.note_tokens(delta.request_id, len(delta.token_ids))

    def _deliver_tokens(self, report: StepReport) -> None:
        """One bundle of runs per link, in its numbering."""
        bundles: dict[LinkSession, list[TokenRun]] = defaultdict(list)
        listener = self._in_flight.listener
        for engine_id, attempt, first_offset, token_ids in report.tokens.runs():
            flight = listener(engine_id)
            if flight is not None:
                bundles[flight.link].append((flight.request_id, attempt, first_offset, token_ids))
        for session, runs in bundles.items():
            session.outbox.add_tokens(report.step, runs)

    def _deliver_deltas(self, report: StepReport) -> list[Flight[LinkSession]]:
        """One bundle of deltas per link. Returns the live flights that ended."""
        bundles: dict[LinkSession, list[SequenceDelta]] = defaultdict(list)
        ended = []
        for delta in report.deltas:
            flight = self._in_flight.listener(delta.request_id)
            if flight is not None:
                bundles[flight.link].append(replace(delta, request_id=flight.request_id))
            if delta.finish is None:
                continue
            if delta.timing is not None:
                self.wasted_tokens += delta.timing.wasted_tokens
            if flight is not None:
                ended.append(flight)
            self._land(delta.request_id)
        for session, deltas in bundles.items():
            session.outbox.add_deltas(report.step, deltas)
        return ended

    def _land(self, engine_id: int) -> None:
        self._in_flight.land(engine_id)
        if self._energy is None:
            self._settle_unknown(engine_id)
        else:
            self.billed.clear()

    def _settle_unknown(self, engine_id: int) -> None:
        """Say so: a router would wait for joules that never come."""
        flight = self._in_flight.settle(engine_id)
        if flight is not None:
            self._state_energy(flight, None)

    def _state_energy(self, flight: Flight[LinkSession], joules: RequestJoules | None) -> None:
        if flight.link in self._sessions:
            statement = EnergyStatement(request_id=flight.request_id, attempt=flight.attempt, joules=joules)
            flight.link.outbox.add_energy((statement,))

    def _report_provisional(self, flight: Flight[LinkSession]) -> None:
        """Right behind the last delta, for a router that cannot wait for the meter."""
        joules = None if self._energy is None else self._energy.provisional(flight.engine_id)
        if joules is not None:
            self._state_energy(flight, joules)


def _refused(request: GenerationRequest, code: str, message: str) -> SequenceDelta:
    """`code` names a gRPC status."""
    return SequenceDelta(
        request_id=request.request_id,
        attempt=request.attempt,
        first_offset=request.first_offset,
        token_ids=(),
        finish=FinishReason.ERROR,
        error=(code, message),
    )
