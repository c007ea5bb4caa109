"""What each tenant was given of the last requests: who is below its fair share now. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from cluster.admission.tenant import Tenant

WINDOW = 128
"""Requests. Older ones are forgotten: who was quiet for long has no right to a flood."""


class Shares:
    """Virtual tokens of the last requests, by tenant. Mutable; bounded by its window."""

    def __init__(self) -> None:
        self._given: deque[tuple[Tenant, float]] = deque()
        self._costs: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def give(self, tenant: Tenant, cost: float) -> None:
        """A request of this cost is served."""
        self._given.append((tenant, cost))
        self._costs[tenant.name] = self._costs.get(tenant.name, 0.0) + cost
        self._counts[tenant.name] = self._counts.get(tenant.name, 0) + 1
        if len(self._given) > WINDOW:
            self._forget(*self._given.popleft())

    def is_below(self, tenant: Tenant, cost: float, *, waiting: Mapping[str, tuple[Tenant, float]]) -> bool:
        """Whether a tenant stays within its share of all that was given and waits, if it gets this much more.

        `waiting` is the cost of what waits, by tenant. Where one is below its share, another is above.
        """
        active = {one.name: one.weight for one, _ in self._given}
        active |= {name: one.weight for name, (one, _) in waiting.items()}
        active[tenant.name] = tenant.weight
        total = sum(self._costs.values()) + sum(cost for _, cost in waiting.values())
        own = self._costs.get(tenant.name, 0.0) + (waiting[tenant.name][1] if tenant.name in waiting else 0.0)
        return (own + cost) / tenant.weight <= total / sum(active.values())

    def _forget(self, tenant: Tenant, cost: float) -> None:
        self._counts[tenant.name] -= 1
        self._costs[tenant.name] -= cost
        if self._counts[tenant.name] == 0:
            # With what rounding left of it.
            del self._counts[tenant.name], self._costs[tenant.name]
