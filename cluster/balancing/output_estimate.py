"""How long an answer is expected to be, from the answers before it. Pure."""

from __future__ import annotations

FIRST_GUESS_TOKENS = 256.0
NEWEST_WEIGHT = 0.05


class OutputEstimate:
    """A running mean. Mutable; owned by one model."""

    def __init__(self) -> None:
        self._mean_tokens = FIRST_GUESS_TOKENS

    def add(self, output_tokens: int) -> None:
        """An answer ended."""
        self._mean_tokens += NEWEST_WEIGHT * (output_tokens - self._mean_tokens)

    def tokens(self, *, max_tokens: int) -> int:
        """Of an answer that may have `max_tokens`; at least one."""
        return max(1, min(max_tokens, round(self._mean_tokens)))
