"""Moves an interrupted stream to another replica: the rest of its job, sent to where it may go on.

The decision is `failover.py`'s; here are the places to go, the wait for one, and the record of the move.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import NoReturn
from weakref import WeakKeyDictionary

from cluster.config import FailoverSection
from cluster.link.replica_connection import ReplicaConnection
from cluster.request.errors import FailoverSpent, Overloaded, Quarantined, ReplicaStopped, RouterError
from cluster.request.failover import FailoverBudget, LossReason, Quarantine, Verdict, decide
from cluster.router.caller import Caller
from cluster.router.route_finder import Errand, Place, RouteFinder
from cluster.router.run import Attempt, Run
from cluster.router.suspicion import Probation, Standing, standing_of
from cluster.telemetry.metrics import RouterMetrics

LOOK_AGAIN_S = 0.05
"""How often a stream that waits looks for a replica: room comes without an event."""
LOOK_FOR_A_TURN_S = 0.01
PROBATION_S = 10.0
"""How long a stream keeps away from others that have to prove themselves; then it goes on beside them.
A time without any replica does not count: nobody proved anything in it."""


class Resumption:
    """One per router, for all its streams: they share the budget. Owned by the event loop."""

    def __init__(
        self,
        *,
        section: FailoverSection,
        finder: RouteFinder,
        metrics: RouterMetrics,
        clock_s: Callable[[], float] = monotonic,
    ) -> None:
        self._section = section
        self._finder = finder
        self._metrics = metrics
        self._clock_s = clock_s
        self._budget = FailoverBudget(ratio=section.budget_ratio, burst=section.burst)
        self._quarantine = Quarantine()
        self._probations: WeakKeyDictionary[ReplicaConnection, Probation] = WeakKeyDictionary()

    def admit(self, model: str, prompt_ids: tuple[int, ...]) -> None:
        """A request came in. Raises Quarantined for one that replicas died of."""
        if self._quarantine.holds(model, prompt_ids, now_s=self._clock_s()):
            raise Quarantined
        self._budget.earn()

    async def resume(self, run: Run, caller: Caller, error: RouterError) -> None:
        """Start the next attempt at what is left of `run`, whose attempt ended with `error`.

        Raises an error, mostly this one, where the stream does not go on.
        """
        lost, loss = run.attempt, _loss_of(run, error)
        run.losses.append(loss)
        self._judge(run, is_culprit=loss.is_kill and self._probation(lost.connection).is_culprit(lost))
        standing = standing_of(run.attempts, run.losses)
        place = await self._find_place(run, caller, error, standing)
        self._judge(run)  # Others may have spent the budget while this one waited.
        offset = len(run.delivered_ids)
        lost.release()
        job = run.job.resumed(
            run.delivered_ids,
            attempt=len(run.attempts),
            lane=place.lane,
            deadline_s=caller.deadline_s(),
            cached_tokens=place.cached_tokens,
        )
        try:
            stream, account = place.connection.submit(job)
        except Overloaded:
            raise error from None
        self._budget.spend()
        attempt = Attempt(
            connection=place.connection,
            stream=stream,
            account=account,
            lane=place.lane,
            first_offset=offset,
            prompt_tokens=len(job.prompt_ids),
            decision=place.decision,
        )
        self._probation(place.connection).join(attempt, standing)
        run.attempts.append(attempt)
        reason = run.losses[-1].value
        self._metrics.count_failover(run.model.name, reason)
        run.span.add_failover(
            reason=reason,
            offset=offset,
            from_replica=lost.connection.replica_id,
            to_replica=place.connection.replica_id,
        )

    def _probation(self, connection: ReplicaConnection) -> Probation:
        return self._probations.setdefault(connection, Probation())

    def _judge(self, run: Run, *, is_culprit: bool = False) -> None:
        verdict = decide(
            len(run.losses),
            is_culprit=is_culprit,
            per_request=self._section.per_request,
            has_budget=self._budget.has_token,
        )
        if verdict is not Verdict.RESUME:
            self._refuse(run, verdict)

    def _refuse(self, run: Run, verdict: Verdict) -> NoReturn:
        match verdict:
            case Verdict.QUARANTINE:
                self._quarantine.add(run.model.name, run.job.prompt_ids, now_s=self._clock_s())
                raise Quarantined
            case Verdict.REQUEST_SPENT:
                raise FailoverSpent(f"a request is moved {self._section.per_request} times at most")
            case _:
                raise FailoverSpent("this router moves no more streams for now")

    async def _find_place(self, run: Run, caller: Caller, error: RouterError, standing: Standing) -> Place:
        """Where it may go on. Raises `error` if there is no such place in time."""
        job, lost = run.job, run.attempt.connection
        context_tokens = len(job.prompt_ids) + job.max_tokens
        # Its word that it is draining may still be on the way.
        excluded = lost if run.losses[-1] is LossReason.REFUSED else None
        errand = Errand(
            prompt_ids=(*job.prompt_ids, *run.delivered_ids),
            output_tokens=run.model.output_estimate.tokens(
                max_tokens=job.max_tokens - len(run.delivered_ids)
            ),
            cache_salt=job.cache_salt,
        )
        give_up_s, in_company_s = self._clock_s() + self._section.wait_s, float("inf")
        while True:
            has_replica = has_to_wait = False

            def accepts(one: ReplicaConnection) -> bool:
                nonlocal has_replica, has_to_wait, in_company_s
                if one is excluded or one.hello.context_tokens < context_tokens:
                    return False
                has_replica, now_s = True, self._clock_s()
                in_company_s = min(in_company_s, now_s + PROBATION_S)
                is_its_turn = now_s >= in_company_s or self._probation(one).admits(standing)
                has_to_wait = has_to_wait or not is_its_turn
                return is_its_turn

            place = self._finder.find(run.model.section, errand, identity=lost.identity, accepts=accepts)
            if place is not None:
                return place
            caller.deadline_s()
            if not has_replica:
                in_company_s = float("inf")
            if not has_to_wait and self._clock_s() >= give_up_s:
                raise error
            await asyncio.sleep(LOOK_FOR_A_TURN_S if has_to_wait else LOOK_AGAIN_S)


def _loss_of(run: Run, error: RouterError) -> LossReason:
    """How the replica was lost. Raises the error again where it is not about the replica.

    A full queue is an answer for a new request, which may come back later; a stream under way cannot.
    """
    if isinstance(error, ReplicaStopped):
        return error.reason
    if isinstance(error, Overloaded) and len(run.attempts) > 1:
        return LossReason.REFUSED
    raise error
