"""Where requests of one model wait for a replica: the edge around the fair queue, which decides the order.

A request that a lane can begin at once goes straight there, unless others wait. Else it joins the queue, or
is refused with the reason; whenever a replica tells its load, and a few times a second, as many as lanes can
begin are let through. Whoever leaves, for whatever reason, is out of the queue at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic

from cluster.admission.decision import Verdict, Wait, decide_wait
from cluster.admission.fair_queue import FairQueue, Waiting, virtual_tokens
from cluster.admission.pace import AHEAD_S, Forecast, Pace, takes_more
from cluster.admission.tenant import Tenant
from cluster.balancing.lane_view import LaneView
from cluster.balancing.prediction import prefill_rate
from cluster.link.replica_pool import ReplicaPool
from cluster.request.errors import DeadlinePassed, NoReplica, RouterError
from cluster.router.refusal import Refusals
from cluster.router.route_finder import Errand, Place, RouteFinder
from cluster.served_model import ServedModel

TURNED_OUT_RETRY_MS = 1000
TICK_S = 0.05
"""How often the queue looks for room that comes without a word, and for replicas that left."""
UNKNOWN = Forecast()
LANES_S = 0.1
"""How long a list of the lanes is good enough for a forecast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A place, kept until the request is on its way there: others would take it for free."""

    place: Place
    hold: int

    def drop(self) -> None:
        self.place.connection.drop_hold(self.hold)


@dataclass(slots=True, eq=False)
class Ticket:
    """Who waits, and how it is told. A caller that goes cancels the future before it leaves the queue."""

    errand: Errand
    place: asyncio.Future[Held]
    is_queued: bool = True
    since_s: float = 0.0
    forecast: Forecast = UNKNOWN


class Gate:
    """One per model. Owned by the event loop."""

    def __init__(
        self,
        model: ServedModel,
        *,
        pool: ReplicaPool,
        finder: RouteFinder,
        refusals: Refusals,
        clock_s: Callable[[], float] = monotonic,
    ) -> None:
        self._model = model
        self._pool = pool
        self._finder = finder
        self._refusals = refusals
        self._clock_s = clock_s
        self._queue: FairQueue[Ticket] = FairQueue()
        self._pace = Pace()
        self._lanes: tuple[float, list[LaneView]] = (float("-inf"), [])
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @asynccontextmanager
    async def place(
        self,
        errand: Errand,
        *,
        tenant: Tenant,
        priority: int,
        deadline_s: float | None,
        asked: Callable[[Wait], None] = lambda _: None,
    ) -> AsyncIterator[Place]:
        """A place for the request, held for it inside the block; submit it there.

        `asked` is told what is known where it cannot begin at once, whatever is decided then.
        Raises Overloaded where waiting would be in vain, NoReplica where there is nothing to wait for,
        DeadlinePassed where the wait took all the time there was.
        """
        cost = _cost_of(errand)
        held = None if self._queue else self._hold(errand, tenant)
        if held is not None:
            self._queue.count(tenant, cost)
        else:
            waiting = Waiting(
                item=Ticket(errand, asyncio.get_running_loop().create_future()),
                tenant=tenant,
                priority=priority,
                tokens=len(errand.prompt_ids) + errand.output_tokens,
                cost=cost,
            )
            held = await self._wait(waiting, deadline_s, asked)
        try:
            yield held.place
        finally:
            held.drop()

    def count(self, tenant: Tenant, errand: Errand) -> None:
        """A request begins past the queue, since it was in turn before at another router."""
        self._queue.count(tenant, _cost_of(errand))

    def correct(self, tenant: Tenant, errand: Errand, *, uncached_tokens: int, output_tokens: int) -> None:
        """What a request really took of its tenant's share."""
        took = virtual_tokens(uncached_tokens=uncached_tokens, output_tokens=output_tokens)
        self._queue.correct(tenant, took - _cost_of(errand))

    def pump(self) -> None:
        """Let through whom a lane can begin now, in their order. Cheap while nobody waits."""
        while (head := self._queue.head()) is not None:
            if head.item.place.done():
                self._take_out(head)
                continue
            held = self._hold(head.item.errand, head.tenant)
            if held is None:
                break
            now_s = self._clock_s()
            self._pace.left(head.tokens, now_s=now_s)  # Who leaves an empty queue behind tells no pace.
            self._take_out(head)
            self._queue.count(head.tenant, head.cost)
            self._pace.waited(head.item.forecast, actual_s=now_s - head.item.since_s)
            head.item.place.set_result(held)

    async def _wait(
        self, waiting: Waiting[Ticket], deadline_s: float | None, asked: Callable[[Wait], None]
    ) -> Held:
        question = self._question(waiting, deadline_s)
        asked(question)
        decision = decide_wait(question)
        if decision.verdict is not Verdict.ADMIT:
            raise self._refusals.of(decision)
        if len(self._queue) >= self._model.section.limits.max_queued:
            self._turn_out_last()
        self._queue.push(waiting)
        self._keep_ticking()
        max_queue_s = self._model.section.limits.max_queue_s
        is_urgent = deadline_s is not None and deadline_s < max_queue_s
        held: Held | None = None
        try:
            async with asyncio.timeout(deadline_s if is_urgent else max_queue_s):
                held = await waiting.item.place
        except TimeoutError:
            if is_urgent:
                raise DeadlinePassed from None
            raise self._refusals.overloaded(
                f"no replica was free for {max_queue_s:g} s", retry_after_ms=TURNED_OUT_RETRY_MS
            ) from None
        finally:
            if held is None:
                self._leave(waiting)
        return held

    def _question(self, waiting: Waiting[Ticket], deadline_s: float | None) -> Wait:
        """What the pure decision is asked."""
        section, errand, now_s = self._model.section, waiting.item.errand, self._clock_s()
        lanes = self._known_lanes(now_s)
        tenant, cost = waiting.tenant, waiting.cost
        is_below_share = self._queue.is_below_share(tenant, cost)
        prompt_tokens = len(errand.prompt_ids)
        forecast = self._pace.forecast(
            self._queue.tokens_ahead(tenant, priority=waiting.priority, cost=cost),
            lanes,
            prompt_tokens=prompt_tokens,
            output_tokens=errand.output_tokens,
            now_s=now_s,
        )
        waiting.item.since_s, waiting.item.forecast = now_s, forecast
        rate = max([prefill_rate(lane) for lane in lanes], default=1.0)
        ttft_ms = section.slo.ttft_ms if section.slo.refuse_late else None
        return Wait(
            num_queued=len(self._queue),
            max_queued=section.limits.max_queued,
            can_displace=self._can_displace(waiting, is_below_share=is_below_share),
            is_below_share=is_below_share,
            wait_s=forecast.mean_s,
            late_s=forecast.late_s,
            start_s=AHEAD_S + prompt_tokens / rate,
            deadline_s=deadline_s,
            target_ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
        )

    def _hold(self, errand: Errand, tenant: Tenant) -> Held | None:
        """A lane that can begin this request, counted as taken; None: there is none now."""
        can_begin = partial(
            takes_more,
            uncached_tokens=len(errand.prompt_ids),
            output_tokens=errand.output_tokens,
            ahead_s=AHEAD_S if self._keeps_back(tenant) else float("inf"),
        )
        place = self._finder.find(self._model.section, errand, takes=can_begin)
        if place is None:
            return None
        hold = place.connection.hold(place.lane, prefill_tokens=len(errand.prompt_ids) - place.cached_tokens)
        return Held(place=place, hold=hold)

    def _keeps_back(self, tenant: Tenant) -> bool:
        """Whether what waits here could yet be refused for being late, or put behind another tenant's."""
        slo = self._model.section.slo
        return (slo.refuse_late and slo.ttft_ms is not None) or self._queue.is_shared(tenant)

    def _known_lanes(self, now_s: float) -> list[LaneView]:
        if now_s - self._lanes[0] > LANES_S:
            self._lanes = (now_s, self._pool.lanes(self._model.name))
        return self._lanes[1]

    def _can_displace(self, waiting: Waiting[Ticket], *, is_below_share: bool) -> bool:
        """Whether the last in the queue matters less, or has more than its share where this one has less."""
        last = self._queue.last()
        if last is None or waiting.priority != last.priority:
            return last is not None and waiting.priority > last.priority
        return is_below_share and last.tenant is not waiting.tenant

    def _turn_out_last(self) -> None:
        """In favour of one that is served before it."""
        last = self._queue.last()
        assert last is not None, "a full queue has a last"
        reason = "requests that go first took this one's place"
        self._fail(last, self._refusals.overloaded(reason, retry_after_ms=TURNED_OUT_RETRY_MS))

    def _keep_ticking(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._queue and not self._pool.ready(self._model.name):
            for waiting in list(self._queue):
                self._fail(waiting, NoReplica("the replicas of this model are gone"))
        self.pump()
        if self._queue:
            self._keep_ticking()

    def _fail(self, waiting: Waiting[Ticket], error: RouterError) -> None:
        self._take_out(waiting)
        if not waiting.item.place.done():
            waiting.item.place.set_exception(error)

    def _leave(self, waiting: Waiting[Ticket]) -> None:
        """Its caller has gone, or it waited too long; a place that came in this very moment is given up."""
        future = waiting.item.place
        if waiting.item.is_queued:
            self._take_out(waiting)
        elif not future.cancelled() and future.exception() is None:
            future.result().drop()

    def _take_out(self, waiting: Waiting[Ticket]) -> None:
        waiting.item.is_queued = False
        self._queue.remove(waiting)
        if not self._queue:
            self._pace.ran_empty()


def _cost_of(errand: Errand) -> float:
    """What is counted until it is known what the request took."""
    return virtual_tokens(uncached_tokens=len(errand.prompt_ids), output_tokens=errand.output_tokens)
