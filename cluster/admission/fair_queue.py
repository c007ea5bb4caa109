"""Requests that wait for a replica, in the order they get one: by priority, then the tenant served least.

Virtual token counters (VTC, OSDI 2024): a tenant's counter grows by the tokens it was given, divided by its
weight, and the lowest counter is served next. A tenant that comes back starts at the lowest counter among
those that wait, so nobody saves up a right to starve others. Work-conserving; the counters of two tenants
that always wait differ by one request at most. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.admission.share import Shares
from cluster.admission.tenant import Tenant

OUTPUT_WEIGHT = 2.0
"""A generated token costs about as much as this many prompt tokens."""

ItemT = TypeVar("ItemT")


def virtual_tokens(*, uncached_tokens: int, output_tokens: int) -> float:
    """What a counter grows by for a request of a tenant of weight 1."""
    return uncached_tokens + OUTPUT_WEIGHT * output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(Generic[ItemT]):
    """One request in the queue. `tokens` are prompt and expected answer; `cost` is virtual."""

    item: ItemT
    tenant: Tenant
    priority: int
    tokens: int
    cost: float


class _Line(Generic[ItemT]):
    """The requests of one tenant at one priority, first come first served, and their sums."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.requests: deque[Waiting[ItemT]] = deque()
        self.tokens = 0
        self.cost = 0.0

    def add(self, waiting: Waiting[ItemT]) -> None:
        self.requests.append(waiting)
        self.tokens += waiting.tokens
        self.cost += waiting.cost

    def remove(self, waiting: Waiting[ItemT]) -> None:
        self.requests.remove(waiting)
        self.tokens -= waiting.tokens
        self.cost -= waiting.cost

    def tokens_within(self, cost: float) -> float:
        """Of as many of them as this cost pays for."""
        return self.tokens * max(0.0, min(1.0, cost / self.cost)) if self.cost > 0.0 else 0.0


class FairQueue(Generic[ItemT]):
    """Mutable; owned by the event loop. Tenants come from the configuration, so counters are few."""

    def __init__(self) -> None:
        self._classes: dict[int, dict[str, _Line[ItemT]]] = {}
        self._counters: dict[str, float] = {}
        self._shares = Shares()
        self._served_at = 0.0
        """The counter of the tenant served last: where one starts when nobody waits."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Waiting[ItemT]]:
        return (one for lines in self._classes.values() for line in lines.values() for one in line.requests)

    def is_shared(self, tenant: Tenant) -> bool:
        """Whether anybody but this tenant was ever given something, or waits: their order is to be fair."""
        return bool(self._counters.keys() - {tenant.name})

    def counter(self, tenant: Tenant) -> float:
        """Virtual tokens given to it so far, by its weight."""
        return self._counters.get(tenant.name, 0.0)

    def push(self, waiting: Waiting[ItemT]) -> None:
        tenant = waiting.tenant
        self._counters[tenant.name] = self._start(tenant)
        lines = self._classes.setdefault(waiting.priority, {})
        if tenant.name not in lines:
            lines[tenant.name] = _Line(tenant)
        lines[tenant.name].add(waiting)
        self._length += 1

    def head(self) -> Waiting[ItemT] | None:
        """Who is next; None: nobody waits."""
        if not self._classes:
            return None
        lines = self._classes[max(self._classes)]
        name = min(lines, key=lambda each: (self._counters[each], each))
        return lines[name].requests[0]

    def remove(self, waiting: Waiting[ItemT]) -> None:
        """It is served, which `count` is told next, or refused, or its caller is gone."""
        lines = self._classes[waiting.priority]
        line = lines[waiting.tenant.name]
        line.remove(waiting)
        self._length -= 1
        if not line.requests:
            del lines[waiting.tenant.name]
        if not lines:
            del self._classes[waiting.priority]

    def count(self, tenant: Tenant, cost: float) -> None:
        """A request is served, from the queue or past an empty one."""
        self._shares.give(tenant, cost)
        self._counters[tenant.name] = self._served_at = self._start(tenant) + cost / tenant.weight

    def correct(self, tenant: Tenant, cost: float) -> None:
        """It was given more than was counted; negative: less."""
        self._counters[tenant.name] = self._counters.get(tenant.name, 0.0) + cost / tenant.weight

    def tokens_ahead(self, tenant: Tenant, *, priority: int, cost: float) -> float:
        """Tokens served before a newcomer of this cost.

        That is all of higher priority, its tenant's own, and of each other tenant what its counter and weight
        give it until the newcomer's turn.
        """
        higher = [lines for each, lines in self._classes.items() if each > priority]
        tokens = float(sum(line.tokens for lines in higher for line in lines.values()))
        lines = self._classes.get(priority, {})
        own = lines.get(tenant.name)
        until = self._start(tenant) + ((own.cost if own else 0.0) + cost) / tenant.weight
        for name, line in lines.items():
            if line is own:
                tokens += line.tokens
            else:
                tokens += line.tokens_within((until - self._counters[name]) * line.tenant.weight)
        return tokens

    def last(self) -> Waiting[ItemT] | None:
        """Whose turn comes last, of the lowest priority. None: nobody waits."""
        if not self._classes:
            return None
        lines = self._classes[min(self._classes)]

        def end(line: _Line[ItemT]) -> float:
            return self._counters[line.tenant.name] + line.cost / line.tenant.weight

        return max(lines.values(), key=end).requests[-1]

    def is_below_share(self, tenant: Tenant, cost: float) -> bool:
        """Whether a newcomer of this cost leaves its tenant within its share of what was given and waits."""
        return self._shares.is_below(tenant, cost, waiting=self._waiting_costs())

    def _waiting_costs(self) -> dict[str, tuple[Tenant, float]]:
        """By tenant, of all priorities."""
        costs: dict[str, tuple[Tenant, float]] = {}
        for lines in self._classes.values():
            for name, line in lines.items():
                costs[name] = (line.tenant, line.cost + (costs[name][1] if name in costs else 0.0))
        return costs

    def _start(self, tenant: Tenant) -> float:
        """Where its counter stands, or would if it came now."""
        own = self._counters.get(tenant.name, 0.0)
        waiting = {name for lines in self._classes.values() for name in lines}
        if tenant.name in waiting:
            return own
        return max(own, min((self._counters[name] for name in waiting), default=self._served_at))
