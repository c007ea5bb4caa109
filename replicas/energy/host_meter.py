"""The meter of a host (CPU packages and memory) beside the meters of its devices, divided among these.

The host knows no groups. What it drew between two reads goes to the groups whose devices are metered, by the
power of each just then; a lone group has it all. Owned by the agent; the pollers' threads take their shares.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from replicas.energy.cpu_model import CpuModelMeter
from replicas.energy.meter import Meter, MeterScope, Reading
from replicas.energy.rapl import POWERCAP_DIR, RaplMeter
from replicas.errors import MeterUnavailable

_LOG = logging.getLogger(__name__)


def open_host_meter(name: str, root: Path = POWERCAP_DIR) -> HostMeter | None:
    """`auto` and `rapl` read RAPL. None where it is `off` or cannot be read, which `rapl` warns of."""
    if name == "off":
        return None
    try:
        return HostMeter(RaplMeter(root))
    except MeterUnavailable as error:
        level = logging.WARNING if name == "rapl" else logging.INFO
        _LOG.log(level, "energy_agent.no_host_meter", extra={"error": str(error)})
        return None


class HostMeter:
    """Nobody has a share while a meter is read that counts CPUs itself: their joules would be told twice."""

    def __init__(self, meter: Meter) -> None:
        self.lock = threading.Lock()
        self.energy_mj = 0
        """What it counted while devices were watched, whoever had a share of it."""
        self.group = "host"
        self._meter = meter
        self._newest: Reading | None = None
        self._hangs = False
        self._last: Reading | None = None
        self._seats: list[HostSeat] = []

    def seat(self, meter: Meter) -> HostSeat:
        """The place of a group's meter at this one, until it leaves."""
        seat = HostSeat(self, counts_cpus=_counts_cpus(meter))
        with self.lock:
            self._seats.append(seat)
        return seat

    def leave(self, seat: HostSeat) -> None:
        with self.lock:
            self._seats.remove(seat)

    def poll(self) -> None:
        """Read it, if anybody may have a share, before the devices. It may hang, so this is under no lock."""
        may_share = not any(seat.counts_cpus for seat in tuple(self._seats))
        self._newest = self._meter.read() if may_share else None

    def set_hangs(self, hangs: bool) -> None:
        """While its read hangs, what the host draws is not known."""
        self._hangs = hangs

    def fail(self, error: Exception) -> None:
        """It is broken, and is not known from now on."""
        _LOG.error("energy_agent.host_meter_broke", extra={"error": repr(error)})
        self._hangs = True

    def close(self) -> None:
        self._meter.close()

    def advance(self) -> None:
        """Divide what is new since the last time. Under the lock."""
        last, self._last = self._last, None
        if not self._hangs and not any(seat.counts_cpus for seat in self._seats):
            self._last = self._newest
        if self._last is None or last is None:
            self._cut()
        elif self._last is not last:
            if self._last.gap:
                self._cut()
            else:
                delta_mj = self._last.energy_mj - last.energy_mj
                self.energy_mj += delta_mj
                self._divide(delta_mj)

    def _cut(self) -> None:
        for seat in self._seats:
            seat.cut()

    def _divide(self, host_mj: int) -> None:
        """What is owed below a millijoule is carried, so the parts add up to `host_mj`."""
        total_w = sum(seat.power_w for seat in self._seats)
        if not total_w:
            self._cut()
            return
        left_mj = host_mj
        for seat in self._seats:
            seat.owed_mj += host_mj * seat.power_w / total_w
            left_mj -= seat.hand(min(left_mj, max(0, int(seat.owed_mj))))
        max(self._seats, key=lambda seat: seat.owed_mj).hand(left_mj)


class HostSeat:
    """One group's part of the host: a count that begins anew when the host's is broken."""

    def __init__(self, host: HostMeter, *, counts_cpus: bool) -> None:
        self.counts_cpus = counts_cpus
        self.power_w = 0.0
        self.owed_mj = 0.0
        self._host = host
        self._share_mj = 0
        self._is_cut = False

    def take_mj(self, power_w: float) -> int | None:
        """The count, at an edge of the group's devices, which draw `power_w`; None: not known to be whole."""
        with self._host.lock:
            self.power_w = power_w
            self._host.advance()
            is_cut, self._is_cut = self._is_cut, False
            return None if is_cut else self._share_mj

    def hand(self, mj: int) -> int:
        """From the host, under its lock."""
        self._share_mj += mj
        self.owed_mj -= mj
        return mj

    def cut(self) -> None:
        self._share_mj, self.owed_mj, self._is_cut = 0, 0.0, True

    def leave(self) -> None:
        self._host.leave(self)


def _counts_cpus(meter: Meter) -> bool:
    return meter.scope is not MeterScope.DEVICE or isinstance(meter, CpuModelMeter)
