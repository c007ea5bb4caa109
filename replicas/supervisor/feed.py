"""What a supervisor asks of whatever meters its group. Implementations: `meter_feed.py`, `sum_feed.py`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from replicas.energy.meter import Reading
from replicas.request import StepRecord


class MeterFeed(Protocol):
    """An endless stream of readings of one group's devices."""

    @property
    def metrics_addresses(self) -> tuple[str, ...]:
        """Where its meters show their own /metrics; an empty one: nowhere, or not known yet."""

    def note_step(self, record: StepRecord) -> None:
        """A forward pass ran."""

    def want_edge(self) -> None:
        """A request begins or has ended: a reading is wanted soon."""

    def readings(self) -> AsyncGenerator[Reading, None]:
        """Yields until closed. Raises MeterUnavailable when there is no such meter."""
