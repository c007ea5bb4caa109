"""The meters of a group's hosts as one: their edges in, edges of the sum out. Pure.

Hosts are read at different instants. The sum has an edge where the slowest of them has its newest one; the
others' counts are taken on the straight line between their edges around it. So no joule is made or lost: what
a window has too much its neighbour lacks, and where all were read at once the sum is that of the counters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise

from replicas.energy.meter import CONFIDENCE_FACTORS, Reading

_EDGES_KEPT = 4096
"""Of a meter that waits for another one: minutes of them."""


class MeterSum:
    """The counts of `num_meters` meters, all on one clock, added up. One owner.

    An edge of the sum says the least certain source of all, a gap where any meter has one in its window, and
    `static_mj` and `host_mj` only where every meter tells them. A meter that is silent holds up the sum; its
    next window is as wide as that lasted.
    """

    def __init__(self, num_meters: int) -> None:
        self._edges: tuple[deque[Reading], ...] = tuple(deque() for _ in range(num_meters))
        """Per meter: the last one up to where the sum is, and all after it."""
        self._owes_gap = [False] * num_meters
        self._until_ns: int | None = None
        """Where the sum is; None: it has not begun."""

    def add(self, index: int, edge: Reading) -> Reading | None:
        """The next edge of meter `index`; gives the edge of the sum that it makes possible, if any.

        One that is not newer than the last is left out: the next one counts its energy.
        """
        edges = self._edges[index]
        if edges and edge.t_ns <= edges[-1].t_ns:
            self._owes_gap[index] = self._owes_gap[index] or edge.gap
            return None
        edges.append(replace(edge, gap=True) if self._owes_gap[index] else edge)
        self._owes_gap[index] = False
        if len(edges) > _EDGES_KEPT:
            _leave_out_second(edges)
        if not all(self._edges):
            return None
        t_ns = min(each[-1].t_ns for each in self._edges)
        begin_ns = max(each[0].t_ns for each in self._edges) if self._until_ns is None else self._until_ns + 1
        return self._edge(t_ns) if t_ns >= begin_ns else None

    def _edge(self, t_ns: int) -> Reading:
        """The sum at `t_ns`, up to where every meter is known."""
        begins = self._until_ns is None
        spans = [] if begins else [span for each in self._edges for span in _spans(each, t_ns)]
        self._until_ns = t_ns
        for each in self._edges:
            while len(each) > 1 and each[1].t_ns <= t_ns:
                each.popleft()
        return Reading(
            t_ns=t_ns,
            energy_mj=self._sum(t_ns, lambda edge: edge.energy_mj) or 0,
            source=max((each[-1].source for each in self._edges), key=CONFIDENCE_FACTORS.__getitem__),
            static_mj=self._sum(t_ns, lambda edge: edge.static_mj),
            gap=any(end.gap for _, end in spans),
            host_mj=None if any(map(_begins_anew, spans)) else self._sum(t_ns, lambda edge: edge.host_mj),
        )

    def _sum(self, t_ns: int, count_of: Callable[[Reading], int | None]) -> int | None:
        """None where a meter does not tell it."""
        counts = [_count_at(t_ns, each, count_of) for each in self._edges]
        return None if None in counts else sum(count for count in counts if count is not None)


def _spans(edges: deque[Reading], t_ns: int) -> list[tuple[Reading, Reading]]:
    """Those from edge to edge that began before `t_ns`."""
    return [(start, end) for start, end in pairwise(edges) if start.t_ns < t_ns]


def _begins_anew(span: tuple[Reading, Reading]) -> bool:
    """Whether the count of the host may have been broken in it."""
    start_mj, end_mj = span[0].host_mj, span[1].host_mj
    return start_mj is None or end_mj is None or end_mj < start_mj


def _count_at(t_ns: int, edges: deque[Reading], count_of: Callable[[Reading], int | None]) -> int | None:
    """On the line between the first two edges, rounded down, so that it never falls."""
    first_mj = count_of(edges[0])
    if edges[0].t_ns == t_ns or first_mj is None:
        return first_mj
    second_mj = count_of(edges[1])
    if second_mj is None:
        return None
    past_ns, span_ns = t_ns - edges[0].t_ns, edges[1].t_ns - edges[0].t_ns
    return first_mj + (second_mj - first_mj) * past_ns // span_ns


def _leave_out_second(edges: deque[Reading]) -> None:
    """The window around it becomes one, with the gap and the host's break of either."""
    first, second, third = islice(edges, 3)
    is_broken = _begins_anew((first, second)) or _begins_anew((second, third))
    edges[2] = replace(third, gap=second.gap or third.gap, host_mj=None if is_broken else third.host_mj)
    del edges[1]
