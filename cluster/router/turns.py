"""Whose turn it is to go on where: streams that a replica died under come to the next one a few at a time.

`suspicion.py` decides who may be there together; here are the probations of the attached replicas, and the
wait for a place. Whoever has nothing against it waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from random import Random
from time import monotonic
from weakref import WeakKeyDictionary

from cluster.config import ModelSection
from cluster.link.replica_connection import ReplicaConnection
from cluster.request.failover import ReplicaIdentity
from cluster.router.caller import Caller
from cluster.router.route_finder import Errand, Place, RouteFinder
from cluster.router.run import Attempt
from cluster.router.suspicion import Probation, Standing

LOOK_AGAIN_S = 0.05
"""How often a stream that waits looks for a replica: room comes without an event."""
LOOK_FOR_A_TURN_S = 0.01
LOOK_COST_S = 0.002
"""A turn is looked for once in this time by all that wait together, however many they are."""
PROBATION_S = 10.0
"""How long a stream keeps away from others that have to prove themselves; then it goes on beside them.
A time without any replica does not count: nobody proves anything in it."""

SPREAD_S = 2.0
"""Who goes alone does so at some moment in this time: another router may have another that has to."""


@dataclass(slots=True)
class Hold:
    """A place in a probation for one that is about to come. Mutable; nothing came of it yet."""

    num_tokens: int = 0
    is_over: bool = False


class Turns:
    """One per router. Owned by the event loop."""

    def __init__(
        self, *, finder: RouteFinder, random: Random, clock_s: Callable[[], float] = monotonic
    ) -> None:
        self._finder = finder
        self._random = random
        self._clock_s = clock_s
        self._num_waiting = 0
        self._probations: WeakKeyDictionary[ReplicaConnection, Probation] = WeakKeyDictionary()

    def join(self, attempt: Attempt, standing: Standing) -> None:
        """It went on there."""
        self._probation(attempt.connection).join(attempt, standing)

    @contextmanager
    def hold(self, connection: ReplicaConnection, standing: Standing) -> Iterator[None]:
        """It will go on there before this is over: nobody else takes its turn."""
        hold = Hold()
        self._probation(connection).join(hold, standing)
        try:
            yield
        finally:
            hold.is_over = True

    def is_culprit(self, attempt: Attempt) -> bool:
        """Its replica died: whether of it."""
        connection = attempt.connection
        return self._probation(connection).is_culprit(attempt, num_unproven=connection.num_unproven)

    async def find(
        self,
        section: ModelSection,
        errand: Errand,
        *,
        standing: Standing,
        caller: Caller,
        identity: ReplicaIdentity,
        accepts: Callable[[ReplicaConnection], bool],
        wait_s: float,
    ) -> Place | None:
        """A place where it may go on, after `wait_s` and its turn at the latest; None: there is none.

        Raises DeadlinePassed.
        """
        if standing.num_deaths > 1:
            await asyncio.sleep(self._random.uniform(0.0, SPREAD_S))
        give_up_s, in_company_s = self._clock_s() + wait_s, inf
        while True:
            has_replica = has_to_wait = False

            def may_go(one: ReplicaConnection) -> bool:
                nonlocal has_replica, has_to_wait, in_company_s
                if not accepts(one):
                    return False
                has_replica, now_s = True, self._clock_s()
                in_company_s = min(in_company_s, now_s + PROBATION_S)
                is_its_turn = now_s >= in_company_s or self._probation(one).admits(standing)
                has_to_wait = has_to_wait or not is_its_turn
                return is_its_turn

            place = self._finder.find(section, errand, identity=identity, accepts=may_go)
            if place is not None:
                return place
            caller.deadline_s()
            if not has_replica:
                in_company_s = inf
            if not has_to_wait and self._clock_s() >= give_up_s:
                return None
            await self._look_later(for_a_turn=has_to_wait)

    async def _look_later(self, *, for_a_turn: bool) -> None:
        self._num_waiting += 1
        try:
            turn_s = max(LOOK_FOR_A_TURN_S, LOOK_COST_S * self._num_waiting)
            await asyncio.sleep(turn_s if for_a_turn else LOOK_AGAIN_S)
        finally:
            self._num_waiting -= 1

    def _probation(self, connection: ReplicaConnection) -> Probation:
        return self._probations.setdefault(connection, Probation())
