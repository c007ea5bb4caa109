"""What part of this process's CPU time some of its code takes: its stack looked at each millisecond of it.

The timer counts CPU time of the process, so other work on the machine changes nothing but the caches. Only
the main thread is looked at. While that sleeps, a signal waits until it is awake, in code of the event loop.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

PERIOD_S = 0.001

IsHit = Callable[[str, str], bool]
"""Whether a function, by its file and its name, is of the code in question."""


@dataclass(slots=True, kw_only=True)
class CpuSamples:
    """`num_hits` of `num_looks` found the code on the stack."""

    num_looks: int = 0
    num_hits: int = 0

    @property
    def hit_s(self) -> float:
        """CPU time of the code."""
        return self.num_hits * PERIOD_S


@contextmanager
def sampling(is_hit: IsHit) -> Iterator[CpuSamples]:
    """Look while inside. From the main thread only, one at a time."""
    samples = CpuSamples()
    known: dict[tuple[str, str], bool] = {}

    def is_known_hit(frame: FrameType) -> bool:
        key = (frame.f_code.co_filename, frame.f_code.co_name)
        if key not in known:
            known[key] = is_hit(*key)
        return known[key]

    def look(_: int, frame: FrameType | None) -> None:
        samples.num_looks += 1
        while frame is not None:
            if is_known_hit(frame):
                samples.num_hits += 1
                return
            frame = frame.f_back

    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, PERIOD_S, PERIOD_S)
    try:
        yield samples
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
