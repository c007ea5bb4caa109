"""A rank group that is ready, being served: its steps, its meter, its links, and the watch over it.

Everything here ends together: `run` returns only by raising, when a rank is lost or we made a mistake. Owned
by `supervisor.py`, which decides what follows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing, suppress

from replicas.energy.learning import CoefficientLearner
from replicas.energy.ledger import Ledger
from replicas.energy.weights import coefficients_for
from replicas.errors import MeterUnavailable, RankLost
from replicas.expert_heat import heat_of
from replicas.expert_loads import ExpertLoads
from replicas.frames import Command, EngineFailure, Event, Submit
from replicas.link.links import LinkPool
from replicas.link.messages import Goodbye, ReplicaCard
from replicas.request import StepRecord
from replicas.step_report import StepReport
from replicas.supervisor.dispatcher import Dispatcher
from replicas.supervisor.energy_account import EnergyAccount
from replicas.supervisor.engine_socket import EngineSocket
from replicas.supervisor.expert_metrics import ExpertSnapshot, next_snapshot
from replicas.supervisor.feed import MeterFeed
from replicas.supervisor.learned_energy import LearnedFile
from replicas.supervisor.metrics import MetricsSnapshot, ReplicaMetrics
from replicas.supervisor.rank_group import RankGroup
from replicas.supervisor.step_log import StepLog
from replicas.supervisor.step_watch import StepWatch

TICK_S = 0.1
DEATH_REASON_TIMEOUT_S = 1.0
"""How long the end of a socket waits for the group to say which rank died, and why."""
FIRST_READING_TIMEOUT_S = 1.0

logger = logging.getLogger(__name__)


async def next_event(socket: EngineSocket, ranks: RankGroup) -> Event:
    """What rank 0 says next. Raises RankLost, with the best reason there is."""
    try:
        event = await socket.read()
    except RankLost as error:
        raise RankLost(await _death_reason(ranks, otherwise=str(error))) from error
    if isinstance(event, EngineFailure):
        raise RankLost(f"the engine failed: {event.reason}")
    return event


class LiveGroup:
    """One group between EngineReady and its end. Not restartable."""

    def __init__(
        self,
        *,
        card: ReplicaCard,
        socket: EngineSocket,
        ranks: RankGroup,
        feed: MeterFeed | None,
        metrics: ReplicaMetrics,
    ) -> None:
        self._socket = socket
        self._ranks = ranks
        self._feed = feed
        self._metrics = metrics
        self._watch = StepWatch(floor_s=card.config.stall_floor_s)
        self._energy = None
        self._learned_file = None if card.config.source == "null" else LearnedFile(card.config, card.engine)
        if feed is not None:
            shipped = coefficients_for(card.engine.device)
            known = self._learned_file.read() if self._learned_file else None
            ledger = Ledger(
                costs=card.engine.costs,
                coefficients=shipped,
                learner=CoefficientLearner(shipped, known=known),
                lookahead=card.config.limits.lookahead,
            )
            self._energy = EnergyAccount(ledger, clock=time.monotonic_ns)
        self.dispatcher = Dispatcher(card=card, send=self._send, energy=self._energy)
        self._log = StepLog(self._watch, self.dispatcher.trace_of)
        self._links = LinkPool(
            addresses=card.config.routers,
            handler=self.dispatcher,
            credentials=card.config.link_credentials,
        )
        self._first_reading = asyncio.Event()
        self._links_task: asyncio.Task[None] | None = None
        self._num_steps = 0
        self._experts: ExpertSnapshot | None = None
        metrics.follow(self._snapshot)

    async def run(self) -> None:
        """Serve until cancelled. Raises RankLost, or whatever mistake of ours ended it."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read_steps(), name="steps")
                tasks.create_task(self._watch_death(), name="death")
                tasks.create_task(self._tick(), name="tick")
                tasks.create_task(self._follow_meter(), name="meter")
                tasks.create_task(self._follow_links(), name="links")
        except ExceptionGroup as group:
            lost, _ = group.split(RankLost)
            raise (lost or group).exceptions[0] from group

    def check(self) -> None:
        """Raises RankLost while the step under way lasts too long."""
        watch = self._watch
        if watch.is_stalled:
            raise RankLost(
                f"no step for {watch.waited_s:.1f} s (the limit is {watch.limit_s:.1f} s) "
                f"with {self.dispatcher.num_in_flight} requests in flight"
            )

    async def close_links(self, reason: str, *, is_lost: bool = False) -> None:
        """Send what is due and Goodbye on every link. Works after `run` ended too."""
        self.dispatcher.bill_unfinished()
        num_unproven = self.dispatcher.num_unproven
        await self._links.close(Goodbye(reason=reason, is_lost=is_lost, num_unproven=num_unproven))
        if self._learned_file and self._energy and self._energy.learned:
            self._learned_file.write(self._energy.learned)
        if self._links_task is not None:
            self._links_task.cancel()

    async def _read_steps(self) -> None:
        while True:
            event = await next_event(self._socket, self._ranks)
            if isinstance(event, ExpertLoads):
                self._experts = next_snapshot(self._experts, event)
                self.dispatcher.experts = heat_of(event, self._experts.recent)
            if not isinstance(event, StepReport):
                continue
            if event.record is not None:
                self._note_record(event.record)
            else:
                self._watch.note_step(None)
            for delta in event.deltas:
                if delta.error is not None:
                    self._log.note_failure(event.step, delta.request_id, delta.error)
            self.dispatcher.on_step(event)
            if self._feed is not None and any(delta.finish is not None for delta in event.deltas):
                self._feed.want_edge()

    def _note_record(self, record: StepRecord) -> None:
        """While the dispatcher still knows all who were in the step."""
        self._log.note_step(record)
        self._watch.note_step((record.end_ns - record.start_ns) / 1e9)
        self._num_steps += 1
        self._metrics.observe_step(record, self.dispatcher.trace_of)
        if self._feed is not None:
            self._feed.note_step(record)

    def _send(self, command: Command) -> None:
        """To the engine. What was drawn before the first request is not this one's, so a window ends here."""
        is_first = isinstance(command, Submit) and self.dispatcher.num_in_flight == 1
        if self._feed is not None and is_first:
            self._feed.want_edge()
        self._socket.send(command)

    async def _watch_death(self) -> None:
        raise RankLost(await self._ranks.wait_death())

    async def _tick(self) -> None:
        while True:
            self._watch.tick(time.monotonic(), has_work=self.dispatcher.num_in_flight > 0)
            self.check()
            if self._energy is not None:
                self._energy.tick()
                self.dispatcher.settle_energy()
            await asyncio.sleep(TICK_S)

    async def _follow_meter(self) -> None:
        """Serving goes on without a meter: the energy is unknown then, and said to be."""
        if self._feed is None or self._energy is None:
            self._first_reading.set()
            return
        try:
            async with aclosing(self._feed.readings()) as readings:
                async for reading in readings:
                    self._energy.agent_metrics_addresses = self._feed.metrics_addresses
                    self._energy.add_reading(reading)
                    self.dispatcher.settle_energy()
                    self._first_reading.set()
        except MeterUnavailable as error:
            logger.warning("energy_unknown reason=%s", error)
            self.dispatcher.lose_meter()
        self._first_reading.set()

    async def _follow_links(self) -> None:
        """Dial once the meter is known, so that Hello names it. Links outlive `run`, for their Goodbye."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_READING_TIMEOUT_S):
                await self._first_reading.wait()
        self._links_task = asyncio.create_task(self._links.run(), name="link pool")
        await asyncio.shield(self._links_task)

    def _snapshot(self) -> MetricsSnapshot:
        """What /metrics shows now."""
        dispatcher = self.dispatcher
        return MetricsSnapshot(
            load=dispatcher.load().engine,
            num_steps=self._num_steps,
            wasted_tokens=dispatcher.wasted_tokens,
            num_in_flight=dispatcher.num_in_flight,
            num_links=dispatcher.num_links,
            experts=self._experts,
            energy={} if self._energy is None else self._energy.sums,
            quality=None if self._energy is None else self._energy.quality,
        )


async def _death_reason(ranks: RankGroup, *, otherwise: str) -> str:
    try:
        async with asyncio.timeout(DEATH_REASON_TIMEOUT_S):
            return await ranks.wait_death()
    except TimeoutError:
        return otherwise
