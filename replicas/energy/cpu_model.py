"""An honest estimate for machines without a meter: a constant draw, plus a draw per busy core.

Knows nothing of frequency, memory or the rest of the machine, hence its label `tdp`: right within a factor 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import psutil

from replicas.energy.meter import HEALTHY, MeterHealth, MeterScope, Reading, Source

_PJ_PER_MJ = 1_000_000_000
_SOURCE = Source.TDP
"""By a name of its own: to look a member up in an enum runs a function, here twenty times a second."""


def cpu_time_ns(pid: int) -> int | None:
    """CPU time of a process and all its threads; None when it is gone.

    Linux gives every process a clock (id = ~pid << 3 | 2) in nanoseconds; psutil counts in 10 ms ticks and
    serves where there is none.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except (OSError, AttributeError):
        pass
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return round((times.user + times.system) * 1e9)


class CpuModelMeter:
    """`static_w` x time + `core_w` x CPU-seconds of `pids`, both counted from its making.

    Example: 10 W and 8 W with two processes that each keep one core busy counts 26 J a second, 10 of them
    static. A process that ended keeps what it used; a new process under an old id starts at its own zero.
    """

    edges = None
    scope = MeterScope.DEVICE

    def __init__(
        self,
        pids: Sequence[int],
        *,
        static_w: float,
        core_w: float,
        clock: Callable[[], int] = time.monotonic_ns,
        cpu_time_ns: Callable[[int], int | None] = cpu_time_ns,
    ) -> None:
        self._static_mw = round(static_w * 1e3)
        self._core_mw = round(core_w * 1e3)
        self._clock = clock
        self._cpu_time_ns = cpu_time_ns
        self._start_ns = clock()
        self._busy_ns = 0
        self._last_ns = {pid: cpu_time_ns(pid) for pid in pids}

    def read(self) -> Reading:
        t_ns = self._clock()
        for pid, last_ns in self._last_ns.items():
            used_ns = self._cpu_time_ns(pid)
            if used_ns is None:
                continue
            if last_ns is not None:
                self._busy_ns += max(0, used_ns - last_ns)
            self._last_ns[pid] = used_ns
        static_pj = self._static_mw * (t_ns - self._start_ns)
        return Reading(
            t_ns=t_ns,
            energy_mj=(static_pj + self._core_mw * self._busy_ns) // _PJ_PER_MJ,
            source=_SOURCE,
            static_mj=static_pj // _PJ_PER_MJ,
        )

    def health(self) -> MeterHealth:
        return HEALTHY

    def close(self) -> None:
        """Nothing to release."""
