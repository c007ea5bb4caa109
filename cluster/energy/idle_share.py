"""What a request owes of the energy drawn while nothing ran: as large a part as of the requests' energy.

Over the last hour and one source of joules at a time. It is no part of a request's bill, and never added to
it: a quiet hour makes the same answer dearer. Pure: time comes in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

WINDOW_S = 3600.0
SAMPLE_S = 60.0


class EnergySample(NamedTuple):
    """Running sums of one source in millijoules, at a time."""

    at_s: float
    requests_mj: int
    idle_mj: int


class IdleShare:
    """Mutable; keeps a sample a minute for each source."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[EnergySample]] = {}
        self._newest: dict[str, EnergySample] = {}

    def note(self, sums: Mapping[str, tuple[int, int]], *, now_s: float) -> None:
        """Sums of requests and of idle by source, which never fall."""
        for source, (requests_mj, idle_mj) in sums.items():
            sample = EnergySample(now_s, requests_mj, idle_mj)
            samples = self._samples.setdefault(source, deque([EnergySample(now_s, 0, 0)]))
            self._newest[source] = sample
            if now_s - samples[-1].at_s >= SAMPLE_S:
                samples.append(sample)
            while len(samples) > 1 and samples[1].at_s <= now_s - WINDOW_S:
                samples.popleft()

    def of_mj(self, source: str, energy_mj: int) -> float | None:
        """The share of a request that took `energy_mj`; None while the hour has no request of this source."""
        newest = self._newest.get(source)
        if newest is None:
            return None
        oldest = self._samples[source][0]
        requests_mj = newest.requests_mj - oldest.requests_mj
        return energy_mj * (newest.idle_mj - oldest.idle_mj) / requests_mj if requests_mj else None
