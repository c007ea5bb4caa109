"""Moves an interrupted stream to another replica: the rest of its job, sent to where it may go on.

The decision is `failover.py`'s, the wait for a place `turns.py`'s; here are the loss and the move.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import NoReturn

from cluster.config import FailoverSection
from cluster.link.replica_connection import ReplicaConnection
from cluster.request.errors import FailoverSpent, Overloaded, Quarantined, ReplicaStopped, RouterError
from cluster.request.failover import FailoverBudget, LossReason, Quarantine, Verdict, decide
from cluster.router.caller import Caller
from cluster.router.route_finder import Errand, Place
from cluster.router.run import Attempt, Run
from cluster.router.suspicion import CLEAR, Standing
from cluster.router.turns import Turns
from cluster.telemetry.metrics import RouterMetrics


class Resumption:
    """One per router, for all its streams: they share the budget. Owned by the event loop."""

    def __init__(
        self,
        *,
        section: FailoverSection,
        turns: Turns,
        metrics: RouterMetrics,
        clock_s: Callable[[], float] = monotonic,
    ) -> None:
        self._section = section
        self._turns = turns
        self._metrics = metrics
        self._clock_s = clock_s
        self._budget = FailoverBudget(ratio=section.budget_ratio, burst=section.burst)
        self._quarantine = Quarantine()

    def check(self, model: str, prompt_ids: tuple[int, ...]) -> None:
        """Raises Quarantined for a prompt that replicas died of."""
        if self._quarantine.holds(model, prompt_ids, now_s=self._clock_s()):
            raise Quarantined

    def count_admission(self) -> None:
        """A request went to a replica."""
        self._budget.earn()

    def lose(self, run: Run, error: RouterError) -> None:
        """Its attempt ended with `error`: note what that says of it.

        Raises Quarantined where the replica died of it, and the error where it is not about the replica.
        """
        lost, loss = run.attempt, _loss_of(run, error)
        is_culprit = loss.is_kill and self._turns.is_culprit(lost)
        run.losses.append(loss)
        run.standing = run.standing.after(lost, loss, replica=_life_of(lost))
        if is_culprit:
            self._judge(run, is_culprit=True)

    async def resume(self, run: Run, caller: Caller, error: RouterError) -> None:
        """Start the next attempt at what is left of `run`, which lost its replica.

        Raises an error, mostly this one, where the stream does not go on.
        """
        lost = run.attempt
        self._judge(run)
        place = await self._find_place(run)
        if place is None:
            raise error
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
        self._turns.join(attempt, run.standing)
        run.attempts.append(attempt)
        reason = run.losses[-1].value
        self._metrics.count_failover(run.model.name, reason)
        run.span.add_failover(
            reason=reason,
            offset=offset,
            from_replica=lost.connection.replica_id,
            to_replica=place.connection.replica_id,
        )

    async def place_beside(self, first: Run, errand: Errand) -> Place:
        """For another choice of a request whose `first` is done with a replica that is lost.

        Raises ReplicaStopped where there is no place in time, DeadlinePassed.
        """
        place = await self._find_equal(first, errand, standing=CLEAR)
        if place is None:
            raise ReplicaStopped
        return place

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

    async def _find_place(self, run: Run) -> Place | None:
        """Where it may go on; None: there is no such place in time."""
        job = run.job
        errand = Errand(
            prompt_ids=(*job.prompt_ids, *run.delivered_ids),
            output_tokens=run.model.output_estimate.tokens(
                max_tokens=job.max_tokens - len(run.delivered_ids)
            ),
            cache_salt=job.cache_salt,
        )
        # Its word that it is draining may still be on the way.
        excluded = run.attempt.connection if run.losses[-1] is LossReason.REFUSED else None
        return await self._find_equal(run, errand, standing=run.standing, excluded=excluded)

    async def _find_equal(
        self, run: Run, errand: Errand, *, standing: Standing, excluded: ReplicaConnection | None = None
    ) -> Place | None:
        """A replica like the one that `run` was at, with room for all of it; None: none in time."""
        context_tokens = len(run.job.prompt_ids) + run.job.max_tokens
        return await self._turns.find(
            run.model.section,
            errand,
            standing=standing,
            caller=run.way_in.caller,
            identity=run.attempt.connection.identity,
            accepts=lambda one: one is not excluded and one.hello.context_tokens >= context_tokens,
            wait_s=self._section.wait_s,
        )


def _life_of(attempt: Attempt) -> str:
    """A new life of a replica is as good as another replica."""
    return f"{attempt.connection.replica_id}.{attempt.connection.epoch}"


def _loss_of(run: Run, error: RouterError) -> LossReason:
    """How the replica was lost. Raises the error where it is not about the replica.

    A full queue is an answer for a new request, which may come back later; a stream under way cannot.
    """
    if isinstance(error, ReplicaStopped):
        return error.reason
    if isinstance(error, Overloaded) and len(run.attempts) > 1:
        return LossReason.REFUSED
    raise error
