"""Meters without hardware: recorded ones, scripted ones, and the one of the null engine.

They take their clock by constructor and are exact: the joules a test expects can be written down.
"""

from __future__ import annotations

import json
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, TextIO

from replicas.energy.edge_lock import EdgeLock
from replicas.energy.meter import HEALTHY, MeterHealth, MeterScope, Reading, Source

_PJ_PER_MJ = 1_000_000_000
_STEPS_AHEAD = 4096


class StepPowerMeter:
    """The meter of the null engine: `power_w` while a step runs, `idle_power_w` otherwise. Source `fake`.

    Fed with steps in order as they end (`note_step`); a step may be noted up to `settle_s` after its end, so
    `read()` gives the count as of that long ago. Example: 400 W and 80 W, one step of 5 ms in a second counts
    0.005 * 400 + 0.995 * 80 = 81.6 J.
    """

    edges = None
    scope = MeterScope.DEVICE

    def __init__(
        self,
        *,
        power_w: float,
        idle_power_w: float,
        clock: Callable[[], int] = time.monotonic_ns,
        settle_s: float = 0.02,
    ) -> None:
        self._extra_mw = round(power_w * 1e3) - round(idle_power_w * 1e3)
        self._idle_mw = round(idle_power_w * 1e3)
        self._clock = clock
        self._settle_ns = round(settle_s * 1e9)
        self._start_ns = clock()
        self._noted_until_ns = self._start_ns
        self._busy_ns = 0
        self._last: Reading | None = None
        self._ahead: list[tuple[int, int]] = []

    def note_step(self, start_ns: int, end_ns: int) -> None:
        """A step ran. Time already noted is not counted again."""
        start_ns = max(start_ns, self._noted_until_ns)
        if end_ns > start_ns:
            self._ahead.append((start_ns, end_ns))
            self._noted_until_ns = end_ns
        if len(self._ahead) > _STEPS_AHEAD:  # Nobody reads: count the oldest as it is.
            oldest_start_ns, oldest_end_ns = self._ahead.pop(0)
            self._busy_ns += oldest_end_ns - oldest_start_ns

    def read(self) -> Reading:
        """The count up to `settle_s` ago; never falls."""
        t_ns = max(self._start_ns, self._clock() - self._settle_ns)
        if self._last is not None and t_ns <= self._last.t_ns:
            return self._last
        later = []
        for start_ns, end_ns in self._ahead:
            self._busy_ns += max(0, min(end_ns, t_ns) - start_ns)
            if end_ns > t_ns:
                later.append((max(start_ns, t_ns), end_ns))
        self._ahead = later
        static_pj = self._idle_mw * (t_ns - self._start_ns)
        energy_pj = static_pj + self._extra_mw * self._busy_ns
        self._last = Reading(
            t_ns=t_ns,
            energy_mj=energy_pj // _PJ_PER_MJ,
            static_mj=static_pj // _PJ_PER_MJ,
            source=Source.FAKE,
        )
        return self._last

    def health(self) -> MeterHealth:
        return HEALTHY

    def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterFault:
    """What goes wrong with a FakeMeter from `start_ns` on, for `duration_ns` (0: once).

    `stall`: no edges. `lost`: reads give None, the count is kept. `reset`: the count starts again at 0.
    """

    kind: Literal["stall", "lost", "reset"]
    start_ns: int
    duration_ns: int = 0


class FakeMeter:
    """A GPU counter made of a script: piecewise constant power, counted in edges, with faults.

    `power` is ((from_ns, watts), ...) in order; each holds until the next, the last one for ever. Edges come
    every `edge_ns`, as a driver's do. `noise` is the relative error of each edge's power sample, drawn from
    `seed`; 0 is exact. Times are nanoseconds since the meter was made.
    """

    scope = MeterScope.DEVICE

    def __init__(
        self,
        power: Sequence[tuple[int, float]],
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        edge_ns: int = 100_000_000,
        noise: float = 0.0,
        seed: int = 0,
        faults: Sequence[MeterFault] = (),
    ) -> None:
        if not power or power[0][0] != 0 or any(a[0] >= b[0] for a, b in pairwise(power)):
            raise ValueError(f"power={power!r}: give (from_ns, watts) pairs in order, the first from 0")
        self._power = tuple((from_ns, round(watts * 1e3)) for from_ns, watts in power)
        self._clock = clock
        self._start_ns = clock()
        self._edge_ns = edge_ns
        self.edges = EdgeLock(poll_ns=edge_ns // 2, now_ns=self._start_ns)
        self._noise = noise
        self._random = random.Random(seed)
        self._faults = faults
        self._edge_count = 0
        self._counted_pj = 0
        self._base_mj = 0
        self._resets_done = 0
        self._was_lost = False
        self._last = self._reading(gap=False)

    def read(self) -> Reading | None:
        """The last edge, with its own time. Across a reset `energy_mj` stands, and there is a gap."""
        read_ns = self._clock()
        now_ns, last = read_ns - self._start_ns, self._last
        reading = self._read(now_ns)
        self.edges.note(read_ns, has_moved=reading is not last)
        return reading

    def _read(self, now_ns: int) -> Reading | None:
        if self._is("lost", now_ns):
            self._was_lost = True
            return None
        edge_count = self._edge_count
        if not self._is("stall", now_ns):
            edge_count = max(edge_count, now_ns // self._edge_ns)
        if edge_count == self._edge_count:
            return self._last
        while self._edge_count < edge_count:
            self._count_edge()
        resets = sum(f.kind == "reset" and f.start_ns <= now_ns for f in self._faults)
        gap = self._was_lost or resets > self._resets_done
        if resets > self._resets_done:
            self._base_mj, self._counted_pj, self._resets_done = self._last.energy_mj, 0, resets
        self._was_lost = False
        self._last = self._reading(gap=gap)
        return self._last

    def health(self) -> MeterHealth:
        return HEALTHY

    def close(self) -> None:
        """Nothing to release."""

    def _is(self, kind: str, now_ns: int) -> bool:
        for fault in self._faults:
            if fault.kind == kind and fault.start_ns <= now_ns < fault.start_ns + fault.duration_ns:
                return True
        return False

    def _count_edge(self) -> None:
        start_ns = self._edge_count * self._edge_ns
        self._edge_count += 1
        exact_pj = energy_pj(self._power, start_ns, start_ns + self._edge_ns)
        self._counted_pj += round(exact_pj * max(0.0, 1.0 + self._noise * self._random.gauss(0.0, 1.0)))

    def _reading(self, *, gap: bool) -> Reading:
        return Reading(
            t_ns=self._start_ns + self._edge_count * self._edge_ns,
            energy_mj=self._base_mj + self._counted_pj // _PJ_PER_MJ,
            source=Source.FAKE,
            gap=gap,
        )


def energy_pj(power: Sequence[tuple[int, int]], start_ns: int, end_ns: int) -> int:
    """Picojoules of a script of (from_ns, milliwatts) between two times."""
    total_pj = 0
    for index, (from_ns, milliwatts) in enumerate(power):
        until_ns = power[index + 1][0] if index + 1 < len(power) else end_ns
        total_pj += milliwatts * max(0, min(until_ns, end_ns) - max(from_ns, start_ns))
    return total_pj


class ReplayMeter:
    """Plays a recording at the speed of its clock, as if it began now. After its end the count stands."""

    edges = None
    scope = MeterScope.DEVICE

    def __init__(self, readings: Sequence[Reading], *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        if not readings:
            raise ValueError("a recording needs at least one reading")
        self._shift_ns = clock() - readings[0].t_ns
        self._clock = clock
        self._readings = readings
        self._times_ns = [reading.t_ns for reading in readings]
        self._next = 0

    def read(self) -> Reading:
        """The newest reading that is due. A gap among those skipped is on it."""
        due = bisect_right(self._times_ns, self._clock() - self._shift_ns)
        passed = self._readings[self._next : due]
        self._next = max(self._next, due)
        reading = self._readings[self._next - 1]
        gap = any(skipped.gap for skipped in passed)
        return replace(reading, t_ns=reading.t_ns + self._shift_ns, gap=gap)

    def health(self) -> MeterHealth:
        return HEALTHY

    def close(self) -> None:
        """Nothing to release."""


def write_recording(readings: Iterable[Reading], file: TextIO) -> None:
    """One JSON object per line, fields as in Reading."""
    for reading in readings:
        fields = {
            "t_ns": reading.t_ns,
            "energy_mj": reading.energy_mj,
            "source": reading.source.value,
            "static_mj": reading.static_mj,
            "gap": reading.gap,
        }
        file.write(json.dumps(fields) + "\n")


def read_recording(path: Path) -> list[Reading]:
    """The readings of a recording, in order. ValueError names the file, the line and what is wrong."""
    readings: list[Reading] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                fields = json.loads(line)
                reading = Reading(
                    t_ns=int(fields["t_ns"]),
                    energy_mj=int(fields["energy_mj"]),
                    source=Source(fields["source"]),
                    static_mj=None if fields.get("static_mj") is None else int(fields["static_mj"]),
                    gap=bool(fields.get("gap", False)),
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: not a reading ({error!r}): {line.strip()[:200]}"
                ) from error
            if readings and reading.t_ns <= readings[-1].t_ns:
                raise ValueError(f"{path}:{number}: t_ns={reading.t_ns} does not rise")
            readings.append(reading)
    return readings
