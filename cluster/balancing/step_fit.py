"""How much longer an engine's step gets by one more sequence: a running fit over its load snapshots. Pure."""

from __future__ import annotations

NEWEST_WEIGHT = 0.05
"""Share of the newest snapshot: of a batch that changed, most is known after 50 steps."""
MIN_VARIANCE = 0.5
"""Of the batch size; below it a slope is noise, and the last one stays."""


class StepFit:
    """Exponentially weighted moments of (batch size, step time). Mutable; owned by one connection."""

    def __init__(self) -> None:
        self._mean_size = 0.0
        self._mean_ms = 0.0
        self._variance = 0.0
        self._covariance = 0.0
        self._has_value = False
        self.ms_per_sequence = 0.0
        """Never negative: a step that gets shorter by more work is one that something else slowed down."""

    def add(self, *, num_running: int, step_ms: float) -> None:
        """A snapshot of an engine that runs something. Example: (1, 10.2), then (32, 16.4): 0.2 each."""
        if not self._has_value:
            self._mean_size, self._mean_ms, self._has_value = float(num_running), step_ms, True
            return
        size_off, ms_off = num_running - self._mean_size, step_ms - self._mean_ms
        keep = 1.0 - NEWEST_WEIGHT
        self._mean_size += NEWEST_WEIGHT * size_off
        self._mean_ms += NEWEST_WEIGHT * ms_off
        self._variance = keep * (self._variance + NEWEST_WEIGHT * size_off * size_off)
        self._covariance = keep * (self._covariance + NEWEST_WEIGHT * size_off * ms_off)
        if self._variance >= MIN_VARIANCE:
            self.ms_per_sequence = max(0.0, self._covariance / self._variance)
