"""What the host beside the devices drew for each request: kept apart from the requests' own joules. Pure.

Each window's host energy is divided as the window's device energy was: a request's part of the one is its
part of the other, and what went to idle or to nobody is the rest. It is never added to a bill. As integers,
`requests + rest == host meter`, and `taken == billed + rounding + dust + open accounts`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from replicas.energy.meter import Reading
from replicas.energy.payers import NJ_PER_MJ
from replicas.energy.weights import Integers
from replicas.energy.window import MOST_MJ, Window

_MOST_WINDOWS = 4096
"""Open ones; more than a ledger keeps open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTotals:
    """Over closed windows; neither part ever falls. All 0: there is no meter of the host."""

    meter_mj: int
    requests_mj: int

    @property
    def rest_mj(self) -> int:
        return self.meter_mj - self.requests_mj


class HostShare:
    """Whole millijoules of the host in, whole millijoules out. Mutated by the ledger and its cashier only."""

    def __init__(self) -> None:
        self._last: Reading | None = None
        self._since_ns: int | None = None
        """The host is metered without a break since then; None: it is not."""
        self._windows: deque[tuple[int, int]] = deque()
        self._closed_mj = 0
        self._taken_mj = self._billed_mj = 0
        self._owed_nj = self._open_nj = self._dust_nj = self._rounding_nj = 0

    def add_reading(self, reading: Reading) -> None:
        """The next edge of the devices' meter; says what the host drew up to it, where that is known."""
        last, self._last = self._last, reading
        if reading.host_mj is None:
            self._since_ns = None
            return
        if last is None or last.host_mj is None or reading.gap:
            self._since_ns = reading.t_ns
            return
        host_mj = reading.host_mj - last.host_mj
        if not 0 <= host_mj <= MOST_MJ:
            self._since_ns = reading.t_ns
            return
        self._windows.append((reading.t_ns, host_mj))
        if len(self._windows) > _MOST_WINDOWS:
            self._closed_mj += self._windows.popleft()[1]

    def take(self, window: Window, *, busy_mj: int, device_nj: Integers) -> Integers | None:
        """A window closed: an array of the host's nanojoules for those given `device_nj` of `busy_mj`.

        None where the host's energy is unknown, or nobody is to have it.
        """
        host_mj = self._close_until(window.end_ns)
        given_nj = int(device_nj.sum()) if host_mj and busy_mj else 0
        if not given_nj:
            return None
        self._owed_nj += host_mj * NJ_PER_MJ * busy_mj // window.delta_mj
        taken_mj, self._owed_nj = divmod(self._owed_nj, NJ_PER_MJ)
        pool_nj = taken_mj * NJ_PER_MJ + self._dust_nj
        shares_nj = [pool_nj * each_nj // given_nj for each_nj in device_nj.tolist()]
        self._taken_mj += taken_mj
        self._open_nj += sum(shares_nj)
        self._dust_nj = pool_nj - sum(shares_nj)
        return np.array(shares_nj, dtype=np.int64)

    def bill_mj(self, host_nj: int, *, first_ns: int | None) -> int | None:
        """Close an account whose first step began at `first_ns`; None: not all its windows knew the host.

        At most 1 mJ off, with the remainder carried to the next bill.
        """
        exact_nj = host_nj + self._rounding_nj
        total_mj = (exact_nj + NJ_PER_MJ // 2) // NJ_PER_MJ
        self._rounding_nj = exact_nj - total_mj * NJ_PER_MJ
        self._open_nj -= host_nj
        self._billed_mj += total_mj
        is_known = self._since_ns is not None and (first_ns is None or first_ns >= self._since_ns)
        return total_mj if is_known else None

    def totals(self, closed_until_ns: int) -> HostTotals:
        """All windows up to `closed_until_ns` are divided."""
        self._close_until(closed_until_ns)
        return HostTotals(meter_mj=self._closed_mj, requests_mj=self._taken_mj)

    def check(self) -> None:
        """Joules in equal joules out."""
        kept_nj = self._rounding_nj + self._dust_nj + self._open_nj
        assert self._taken_mj * NJ_PER_MJ == self._billed_mj * NJ_PER_MJ + kept_nj
        assert self._open_nj >= 0
        assert self._taken_mj <= self._closed_mj

    def _close_until(self, t_ns: int) -> int:
        """What the host drew in the window that ends at `t_ns`; 0 where that is unknown."""
        last: tuple[int, int] = (0, 0)
        while self._windows and self._windows[0][0] <= t_ns:
            last = self._windows.popleft()
            self._closed_mj += last[1]
        return last[1] if last[0] == t_ns else 0
