"""The energy counters of CPU packages and their memory (RAPL), through Linux' powercap files.

A zone is a folder `intel-rapl:N` with `name`, `energy_uj` and `max_energy_range_uj`, where the counter wraps;
the memory of package N is its child zone named `dram`. Platform zones (`psys`) hold the packages and are left
out. AMD's counters appear under the same names. Used by the energy agent alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from replicas.energy.meter import MeterHealth, MeterScope, MeterState, Reading, Source
from replicas.errors import MeterUnavailable

POWERCAP_DIR = Path("/sys/class/powercap")
_PLAUSIBLE_W = 2_000
"""Of one zone: no package or memory of one draws as much."""
_PERIOD_NS = 1_000_000
_RETRY_NS = 1_000_000_000
_RESET_SHOWN_NS = 60_000_000_000
_UJ_PER_MJ = 1_000
_COUNTER_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RaplZone:
    """A counter: `name` is `package-0` or `package-0/dram`, `range_uj` is where it wraps.

    `unreadable` says why it cannot be read, empty if it can.
    """

    name: str
    path: Path
    range_uj: int = 0
    unreadable: str = ""


def discover_zones(root: Path = POWERCAP_DIR) -> list[RaplZone]:
    """Packages and their memory, in order. MeterUnavailable where the kernel shows none."""
    zones: list[RaplZone] = []
    for path in sorted(root.glob("intel-rapl:*"), key=lambda one: one.name):
        name = _text(path / "name")
        if path.name.count(":") == 1 and name.startswith("package"):
            zones.append(_describe(path, name))
        elif path.name.count(":") == 2 and name == "dram":
            package = _text(root / path.name.rpartition(":")[0] / "name")
            zones.append(_describe(path, f"{package}/dram"))
    if not zones:
        raise MeterUnavailable(
            f"no RAPL counters in {root}: most virtual machines have none, and bare metal needs the kernel "
            "module intel_rapl_msr (`modprobe intel_rapl_msr`); in a container, mount that folder"
        )
    return zones


class RaplMeter:
    """Sum of all zones' counters: the whole host's CPUs and memory, whoever uses them.

    Hence its source `shared`: exact for the host, and an upper bound for one group of processes on it. A wrap
    is undone; after so long without a read that there may have been several (minutes), the reading has `gap`.
    So it has where a counter moves faster than any CPU draws: a reset. A zone that cannot be read gives None
    until it can, and then a gap. The counters stay open: to open one costs several times what reading does.
    """

    edges = None
    scope = MeterScope.HOST

    def __init__(self, root: Path = POWERCAP_DIR, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        zones = discover_zones(root)
        blocked = [zone for zone in zones if zone.unreadable]
        if blocked:
            raise MeterUnavailable(f"RAPL zone {blocked[0].name}: {blocked[0].unreadable}")
        self._zones: Sequence[RaplZone] = zones
        self._files: list[int] = []
        self._clock = clock
        self._last_ns = clock()
        self._counts_uj = self._read_counts_uj()
        self._energy_uj = 0
        self._is_lost = False
        self._retry_ns = 0
        self._reset_until_ns = 0
        self._last: Reading | None = None

    def read(self) -> Reading | None:
        now_ns = self._clock()
        if self._is_lost and now_ns < self._retry_ns:
            return None
        if self._last is not None and now_ns < self._last_ns + _PERIOD_NS:
            return self._last
        try:
            counts_uj = self._read_counts_uj()
        except (OSError, ValueError):
            self.close()
            self._is_lost, self._retry_ns = True, now_ns + _RETRY_NS
            return None
        has_gap = self._take(counts_uj, now_ns)
        self._counts_uj, self._last_ns, self._is_lost = counts_uj, now_ns, False
        self._last = Reading(
            t_ns=now_ns, energy_mj=self._energy_uj // _UJ_PER_MJ, source=Source.SHARED, gap=has_gap
        )
        return self._last

    def health(self) -> MeterHealth:
        if self._is_lost:
            return MeterHealth(state=MeterState.LOST)
        return MeterHealth(state=MeterState.RESET if self._last_ns < self._reset_until_ns else MeterState.OK)

    def close(self) -> None:
        files, self._files = self._files, []
        for file in files:
            os.close(file)

    def _read_counts_uj(self) -> list[int]:
        """Opens what is not open. OSError or ValueError where one cannot be read."""
        for zone in self._zones[len(self._files) :]:
            self._files.append(os.open(zone.path / "energy_uj", os.O_RDONLY))
        return [int(os.pread(file, _COUNTER_BYTES, 0)) for file in self._files]

    def _take(self, counts_uj: Sequence[int], now_ns: int) -> bool:
        """Add what all zones counted, or nothing; says whether the reading is incomplete."""
        if self._is_lost:
            return True
        most_uj = _PLAUSIBLE_W * (now_ns - self._last_ns) // 1_000 + _PLAUSIBLE_W * _PERIOD_NS // 1_000
        deltas_uj = [
            (count_uj - last_uj) % zone.range_uj
            for zone, count_uj, last_uj in zip(self._zones, counts_uj, self._counts_uj, strict=True)
        ]
        may_have_wrapped = most_uj >= min(zone.range_uj for zone in self._zones)
        if may_have_wrapped or max(deltas_uj) > most_uj:
            self._reset_until_ns = now_ns + _RESET_SHOWN_NS
            return True
        self._energy_uj += sum(deltas_uj)
        return False


def _describe(path: Path, name: str) -> RaplZone:
    try:
        range_uj = int(_text(path / "max_energy_range_uj"))
        int((path / "energy_uj").read_text(encoding="ascii"))
    except PermissionError:
        unreadable = (
            f"{path / 'energy_uj'} is for root only (the kernel closed it against a power side channel); "
            "run `wattline agent` as root or in a pod that may read it, or allow it by an udev rule"
        )
        return RaplZone(name=name, path=path, unreadable=unreadable)
    except (OSError, ValueError) as error:
        return RaplZone(name=name, path=path, unreadable=f"cannot be read: {error}")
    if range_uj <= 0:
        return RaplZone(name=name, path=path, unreadable=f"max_energy_range_uj={range_uj} makes no sense")
    return RaplZone(name=name, path=path, range_uj=range_uj)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
