"""One meter window and the time in it: which steps ran when, what was idle, what is not known. Pure.

Every instant of a window is busy, idle, or a hole where a step must have run that nobody recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from replicas.energy.meter import Reading, Source
from replicas.energy.weights import Integers
from replicas.record import record
from replicas.request import StepRows

NO_ROWS = StepRows()
NO_PLACES: Integers = np.zeros(0, dtype=np.int64)
MOST_MJ = 10**12
"""Of one window: a gigajoule is no meter's. Up to there nanojoules fit into 64 bits."""


@record
class Window:
    """The meter between two readings. `static_mj`: None where the meter cannot tell. `gap`: not complete."""

    start_ns: int
    end_ns: int
    delta_mj: int
    source: Source
    static_mj: int | None
    gap: bool

    @property
    def width_ns(self) -> int:
        return self.end_ns - self.start_ns

    def overlap_ns(self, start_ns: int, end_ns: int) -> int:
        return max(0, min(self.end_ns, end_ns) - max(self.start_ns, start_ns))


def window_between(last: Reading, reading: Reading) -> Window:
    """A counter that fell or ran away has lost count: its window is a gap, and never negative."""
    delta_mj = reading.energy_mj - last.energy_mj
    static_mj = None
    if reading.static_mj is not None and last.static_mj is not None:
        static_mj = max(0, reading.static_mj - last.static_mj)
    return Window(
        start_ns=last.t_ns,
        end_ns=reading.t_ns,
        delta_mj=max(0, delta_mj),
        source=reading.source,
        static_mj=static_mj,
        gap=reading.gap or not 0 <= delta_mj <= MOST_MJ,
    )


@dataclass(slots=True)
class Step:
    """A forward pass that waits for its windows to close, and who was in it.

    `is_seen`: the ledger found it in a window that has closed. `places` are the members' in the account book,
    as of the time when so many accounts had fallen out of it.
    """

    start_ns: int
    end_ns: int
    number: int
    rows: StepRows = NO_ROWS
    experts_hit: int = 0
    is_seen: bool = False
    places: Integers = field(default_factory=lambda: NO_PLACES)
    num_evicted: int = 0

    @property
    def duration_ns(self) -> int:
        return max(self.end_ns - self.start_ns, 1)


class Share(NamedTuple):
    """A step's part in a window: time it ran there, and time it was waited for there.

    `ended_ns` is all of its duration if it ended there, else 0.
    """

    step: Step
    ran_ns: int
    waited_ns: int
    ended_ns: int


@record
class Partition:
    """The time of one window; `busy_ns + idle_ns + hole_ns` is its width."""

    shares: tuple[Share, ...]
    busy_ns: int
    idle_ns: int
    hole_ns: int


def partition(
    window: Window, steps: Iterable[Step], *, before: Step | None, is_continued: Callable[[Step], bool]
) -> Partition:
    """Lay `steps` (sorted by start) over `window`; `before` is the newest one that ended before them.

    Steps are numbered without a break, so a missing number before a step proves a record lost: that pause is
    a hole. `is_continued(step)` says whether a member of it was in an earlier step: then the engine was never
    idle in the pause before it, which is time waited for that step. All other pauses are idle. Overlapping
    steps each get their time; busy time counts the overlap once.
    """
    shares: list[Share] = []
    cursor_ns = window_start_ns = window.start_ns
    window_end_ns = window.end_ns
    busy_ns = idle_ns = hole_ns = 0
    for step in steps:
        start_ns = step.start_ns if step.start_ns < window_end_ns else window_end_ns
        end_ns = step.end_ns if step.end_ns < window_end_ns else window_end_ns
        waited_ns = 0
        if start_ns > cursor_ns:
            pause_ns = start_ns - cursor_ns
            if before is not None and step.number > before.number + 1:
                hole_ns += pause_ns
            elif before is not None and is_continued(step):
                waited_ns = pause_ns
                busy_ns += pause_ns
            else:
                idle_ns += pause_ns
            cursor_ns = start_ns
        ran_ns = end_ns - (start_ns if start_ns > window_start_ns else window_start_ns)
        if ran_ns > 0 or waited_ns:
            ended_ns = step.duration_ns if step.end_ns <= window_end_ns else 0
            shares.append(Share(step, ran_ns if ran_ns > 0 else 0, waited_ns, ended_ns))
        if end_ns > cursor_ns:
            busy_ns += end_ns - cursor_ns
            cursor_ns = end_ns
        if before is None or step.end_ns >= before.end_ns:
            before = step
        if step.start_ns >= window_end_ns:
            break
    idle_ns += window_end_ns - cursor_ns
    return Partition(shares=tuple(shares), busy_ns=busy_ns, idle_ns=idle_ns, hole_ns=hole_ns)
