"""Notices that an engine with work in flight stopped stepping, or that a step took far longer than others.

Pure: the time comes in with every call.

The supervisor's loop calls `tick` several times a second and `note_step` at every step frame. Waiting is
counted in ticks of bounded width: a supervisor that was itself frozen does not blame its ranks for the gap.
"""

from __future__ import annotations

from collections import deque
from math import ceil

RECENT_STEPS = 512
P99_FACTOR = 5.0
MAX_TICK_S = 0.5
"""The most one tick adds to the waiting time."""
MIN_SLOW_S = 0.25
MIN_COMPARED_STEPS = 100
"""Of fewer there is no 99th percentile to speak of."""


class StepWatch:
    """How long the step under way has lasted, and how long it may. Owned by one supervisor.

    `floor_s` is the shortest time that counts as a hang, however fast the steps before were.
    """

    def __init__(self, *, floor_s: float) -> None:
        self._floor_s = floor_s
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_tick_s: float | None = None
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        """Time without a step while work was in flight."""
        return self._waited_s

    @property
    def limit_s(self) -> float:
        """A wait longer than this is a hang."""
        return max(self._floor_s, P99_FACTOR * self.step_s_p99)

    @property
    def step_s_p99(self) -> float:
        """Of the recent steps; 0 before the first."""
        if not self._recent_s:
            return 0.0
        ordered = sorted(self._recent_s)
        return ordered[ceil(0.99 * len(ordered)) - 1]

    @property
    def is_stalled(self) -> bool:
        # The floor first: the limit sorts the recent steps, and this is asked many times a second.
        return self._waited_s > self._floor_s and self._waited_s > self.limit_s

    def is_slow(self, duration_s: float) -> bool:
        """Whether a step that is not noted yet stands out from those before it."""
        # The floor first, as above.
        return (
            duration_s >= MIN_SLOW_S
            and len(self._recent_s) >= MIN_COMPARED_STEPS
            and duration_s > P99_FACTOR * self.step_s_p99
        )

    def note_step(self, duration_s: float | None) -> None:
        """A step frame arrived; `duration_s` is None if no forward pass ran in it."""
        if duration_s is not None:
            self._recent_s.append(duration_s)
        self._waited_s = 0.0

    def tick(self, now_s: float, *, has_work: bool) -> None:
        """Time passed until `now_s`, with or without work in the engine."""
        elapsed_s = 0.0 if self._last_tick_s is None else now_s - self._last_tick_s
        self._last_tick_s = now_s
        self._waited_s = self._waited_s + min(elapsed_s, MAX_TICK_S) if has_work else 0.0
