"""Who did how much in one meter window, in the weights of `weights.py`: sums by request. Pure.

Most members of a step have one new token each, and what they weigh is a line over their context. So a window
costs a few numbers per step and a few passes over all rows at once; only members that are not plain are
weighed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from replicas.energy.weights import (
    Column,
    DeviceCoefficients,
    Integers,
    MemberCosts,
    StepWork,
    price_step,
)
from replicas.energy.window import Share
from replicas.record import record
from replicas.request import StepMember

WEIGHT, STATIC, PREFILL, WASTED, RAN_NS, ENDED_NS = range(6)
"""Rows of a table of claims. `STATIC`, `PREFILL` and `WASTED` are parts of `WEIGHT`."""
_NUM_ROWS = 6
_ROWS_OF_ALL = np.array([[WEIGHT], [STATIC], [RAN_NS], [ENDED_NS]])


@record
class Claims:
    """A column for each request, at its place; 0 for those in no step of the window.

    `RAN_NS` is the time of its steps inside the window, `ENDED_NS` the whole duration of those that ended in
    it. `work` is that of all of them.
    """

    table: Column
    work: StepWork


class _Other(NamedTuple):
    """A member that is not plain, where it is among all members of the window, and what it weighs."""

    at: int
    member: StepMember
    weight: float
    static: float


def claims_of(
    shares: Sequence[Share], costs: MemberCosts, device: DeviceCoefficients, *, places: Sequence[Integers]
) -> Claims:
    """Weigh the members of all steps of a window, each step by its part in it; `places` are theirs."""
    sizes = [len(one) for one in places]
    begins = list(accumulate(sizes[:-1], initial=0))
    contexts = np.frombuffer(b"".join([share.step.rows.context_tokens for share in shares]), dtype=np.int64)
    context_sums = np.add.reduceat(contexts, begins).tolist()
    steps: list[tuple[float, ...]] = []  # Six prices, part, RAN_NS, ENDED_NS.
    others: list[_Other] = []
    all_s = all_flops = all_bytes = 0.0
    for share, begin, size, context_tokens in zip(shares, begins, sizes, context_sums, strict=True):
        step, ran_ns, waited_ns, ended_ns = share
        duration_ns, rows = step.duration_ns, step.rows
        part, seconds = (ran_ns + waited_ns) / duration_ns, duration_ns * 1e-9
        flops, kv_bytes = costs.work(rows, num_members=size, context_tokens=context_tokens)
        weight_bytes = costs.weight_bytes(step.experts_hit)
        whole, static = price_step(
            seconds=seconds,
            flops=flops,
            kv_bytes=kv_bytes,
            weight_bytes=weight_bytes,
            num_members=size,
            device=device,
        )
        steps.append((*whole, *static, part, ran_ns, ended_ns))
        for index, member in rows.others:
            weight, static_weight = costs.weight(member, whole), costs.weight(member, static)
            others.append(_Other(begin + index, member, part * weight, part * static_weight))
        all_s += part * seconds
        all_flops += part * flops
        all_bytes += part * (kv_bytes + weight_bytes)
    numbers = np.array(steps).T
    lines = costs.lines(numbers[:6] * numbers[6])
    columns = np.concatenate((lines, numbers[7:])).repeat(sizes, axis=1)
    columns[2:4] *= contexts
    columns[2:4] += columns[:2]  # From here on the columns of `_ROWS_OF_ALL`.
    for at, _, weight, static_weight in others:
        columns[2:4, at] = weight, static_weight
    return Claims(
        table=_by_place(columns[2:], others, np.concatenate(places)),
        work=StepWork(all_s, all_flops, all_bytes),
    )


def _by_place(columns: Column, others: Sequence[_Other], places: Integers) -> Column:
    """A table of claims from columns over all members."""
    num_places = int(places.max()) + 1
    cells = places + num_places * _ROWS_OF_ALL
    sums = np.bincount(cells.ravel(), columns.ravel(), _NUM_ROWS * num_places)
    table = sums.astype(np.float64, copy=False).reshape(_NUM_ROWS, num_places)
    for at, member, weight, _ in others:
        place = places[at]
        if member.is_prefill:
            table[PREFILL, place] += weight
        if member.wasted_tokens:
            table[WASTED, place] += weight * member.wasted_tokens / max(member.new_tokens, 1)
    return table
