"""Rates over the last seconds and the last requests, for Status. Pure: time comes in."""

from __future__ import annotations

from collections import deque

WINDOW_S = 10
LAST_REQUESTS = 64


class TokenRate:
    """Tokens per second over the last ten whole seconds."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque(maxlen=WINDOW_S + 1)
        """(second, tokens in it), oldest first; seconds without tokens are left out."""

    def add(self, num_tokens: int, *, now_s: float) -> None:
        second = int(now_s)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1] = (second, self._seconds[-1][1] + num_tokens)
        else:
            self._seconds.append((second, num_tokens))

    def per_second(self, *, now_s: float) -> float:
        """The second under way counts by the part of it that has passed."""
        oldest = int(now_s) - WINDOW_S + 1
        num_tokens = sum(tokens for second, tokens in self._seconds if second >= oldest)
        return num_tokens / (now_s - oldest) if now_s > oldest else 0.0


class EnergyRate:
    """Joules per output token over the last finished requests: the ratio of sums, not a mean of ratios."""

    def __init__(self) -> None:
        self._requests: deque[tuple[int, int]] = deque(maxlen=LAST_REQUESTS)
        self.source = ""

    def add(self, *, energy_mj: int, output_tokens: int, source: str) -> None:
        if source != self.source:
            # Measured and estimated joules are never summed.
            self._requests.clear()
            self.source = source
        self._requests.append((energy_mj, output_tokens))

    @property
    def joules_per_output_token(self) -> float | None:
        """None before the first request that gave a token."""
        num_tokens = sum(tokens for _, tokens in self._requests)
        if num_tokens == 0:
            return None
        return sum(energy_mj for energy_mj, _ in self._requests) / 1e3 / num_tokens
