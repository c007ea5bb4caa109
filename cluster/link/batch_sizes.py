"""With how many others a sequence was computed, step by step: a histogram, so that it stays small."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SIZE = 1023
"""A batch of more counts as one of this many; it bounds what is kept of one answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpread:
    """Of the steps that gave tokens of one answer, and the sequences in their batches, its own among them."""

    num_steps: int
    min_size: int
    median_size: int
    max_size: int


class BatchSizes:
    """Mutable; owned by one token stream."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}

    def add(self, size: int) -> None:
        """A step gave tokens; `size` sequences were in its batch."""
        size = max(1, min(size, MAX_SIZE))
        self._steps[size] = self._steps.get(size, 0) + 1

    def spread(self) -> BatchSpread | None:
        """None: there was no step. The median is the lower one. Example: 1, 4, 8, 8 has 4."""
        num_steps = sum(self._steps.values())
        if not num_steps:
            return None
        sizes = sorted(self._steps)
        seen = 0
        for size in sizes:
            seen += self._steps[size]
            if 2 * seen >= num_steps:
                return BatchSpread(
                    num_steps=num_steps, min_size=sizes[0], median_size=size, max_size=sizes[-1]
                )
        raise AssertionError("half of the steps are among all of them")
