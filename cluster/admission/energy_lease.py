"""A tenant's joules: a daily budget, handed to routers in slices, and what a router has left of its slices.

Whoever keeps the budgets of all routers implements `LeaseSource`. `LocalLeases` keeps them in this process:
a restart begins the day anew, and two routers with it give a tenant its budget twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

DAY_S = 86_400
SLICES_PER_DAY = 100
"""A router holds a hundredth of a day's budget at a time: that much may be lost with it."""
MIN_SLICE_MJ = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Millijoules to spend today; 0: none are left, and there are more in `retry_after_s`."""

    granted_mj: int
    retry_after_s: float
    day: int
    """Days since 1970, UTC; what is left of a grant lapses with its day."""


class LeaseSource(Protocol):
    async def lease(self, tenant: str, *, want_mj: int) -> Grant:
        """Up to `want_mj` of what the tenant has left today. Raises OSError where nobody can be asked."""

    async def give_back(self, tenant: str, *, unspent_mj: int, day: int) -> None:
        """A router that stops returns what it did not spend."""

    async def close(self) -> None:
        """Nothing is asked any more."""


class LocalLeases:
    """Budgets of this process alone. `wall_s` is the time since 1970."""

    def __init__(self, budgets_j: Mapping[str, float], *, wall_s: Callable[[], float]) -> None:
        self._budgets_mj = {tenant: round(budget_j * 1e3) for tenant, budget_j in budgets_j.items()}
        self._left_mj = dict(self._budgets_mj)
        self._wall_s = wall_s
        self._day = self._today()

    async def lease(self, tenant: str, *, want_mj: int) -> Grant:
        if (day := self._today()) != self._day:
            self._day, self._left_mj = day, dict(self._budgets_mj)
        granted_mj = min(want_mj, self._left_mj[tenant])
        self._left_mj[tenant] -= granted_mj
        retry_after_s = 0.0 if granted_mj else (day + 1) * DAY_S - self._wall_s()
        return Grant(granted_mj=granted_mj, retry_after_s=retry_after_s, day=day)

    async def give_back(self, tenant: str, *, unspent_mj: int, day: int) -> None:
        if day == self._day:
            self._left_mj[tenant] += unspent_mj

    async def close(self) -> None:
        """Nothing to let go of."""

    def _today(self) -> int:
        return int(self._wall_s() // DAY_S)


class Wallet:
    """What one router may still let a tenant spend. Mutable; pure.

    A request reserves what it is expected to cost and settles what it did; so the balance may go below zero
    by what answers cost more than expected, and the next grant pays for it.
    """

    def __init__(self, budget_j: float) -> None:
        self.slice_mj = max(MIN_SLICE_MJ, round(budget_j * 1e3 / SLICES_PER_DAY))
        self.balance_mj = 0
        self.reserved_mj = 0
        self._day: int | None = None

    @property
    def day(self) -> int | None:
        """Of the newest grant; None: there was none yet."""
        return self._day

    @property
    def has_joules(self) -> bool:
        return self.balance_mj > self.reserved_mj

    @property
    def wanted_mj(self) -> int:
        """What to ask for: a slice, and what is owed or promised."""
        return self.slice_mj + max(0, self.reserved_mj - self.balance_mj)

    def add(self, grant: Grant) -> None:
        """What was left of another day has lapsed; a debt has not."""
        if grant.day != self._day:
            self.balance_mj = min(0, self.balance_mj)
            self._day = grant.day
        self.balance_mj += grant.granted_mj

    def reserve(self, expected_mj: int) -> None:
        self.reserved_mj += expected_mj

    def settle(self, expected_mj: int, *, spent_mj: int) -> None:
        """The joules of a request that reserved `expected_mj` are known; unknown ones cost nothing."""
        self.reserved_mj -= expected_mj
        self.balance_mj -= spent_mj
