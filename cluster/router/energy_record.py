"""What GetEnergy answers from: usage and joules of the requests that ended last."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from cluster.energy.account import EnergyAccount
from cluster.request.answer import Usage
from cluster.request.errors import UnknownRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """A request that ended, however it ended. Its account may still be open."""

    request_id: str
    model: str
    usage: Usage
    account: EnergyAccount


class EnergyRecord:
    """At most `capacity` finished requests; the one that was longest not asked for goes first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._requests: OrderedDict[str, FinishedRequest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, finished: FinishedRequest) -> None:
        self._requests[finished.request_id] = finished
        if len(self._requests) > self._capacity:
            self._requests.popitem(last=False)

    def find(self, request_id: str) -> FinishedRequest:
        """Raises UnknownRequest."""
        finished = self._requests.get(request_id)
        if finished is None:
            raise UnknownRequest(
                f"no finished request of this id; the last {self._capacity} are remembered, ask sooner"
            )
        self._requests.move_to_end(request_id)
        return finished
