"""A rate with a burst. It may go into debt, so that one large request is late but never impossible. Pure."""

from __future__ import annotations

BURST_S = 5.0
"""A bucket holds what its rate gives in this time, and at least one."""


class TokenBucket:
    """Mutable; time comes in. Example: at 100 a second, 500 are there at first; 800 leave a debt of 300."""

    def __init__(self, rate_per_s: float, *, now_s: float) -> None:
        self.rate_per_s = rate_per_s
        self._capacity = max(1.0, rate_per_s * BURST_S)
        self._level = self._capacity
        self._at_s = now_s

    def wait_s(self, *, now_s: float) -> float:
        """Until something may be taken; 0: now."""
        self._fill(now_s)
        return 0.0 if self._level > 0.0 else -self._level / self.rate_per_s + 1e-3

    def take(self, amount: float, *, now_s: float) -> None:
        """Negative gives back."""
        self._fill(now_s)
        self._level = min(self._capacity, self._level - amount)

    def _fill(self, now_s: float) -> None:
        self._level = min(self._capacity, self._level + (now_s - self._at_s) * self.rate_per_s)
        self._at_s = now_s
