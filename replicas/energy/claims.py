"""Who did how much in one meter window, in the weights of `weights.py`: a row of sums per request. Pure.

The steps of a window are weighed together, since a window holds a thousand rows and a step only some.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count

import numpy as np
from numpy.typing import NDArray

from replicas.energy.weights import FREE, MemberCosts
from replicas.energy.window import Share, Step

Column = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """By request, all columns in the order of `request_ids`; empty if no step was in the window.

    `prefill`, `static` and `wasted` are parts of `weight`. `ran_ns` is the time of its steps inside the
    window, `ended_ns` the whole duration of those that ended in it.
    """

    request_ids: list[int]
    weight: Column
    prefill: Column
    static: Column
    wasted: Column
    ran_ns: list[int]
    ended_ns: list[int]


def claims_of(shares: Sequence[Share], costs: MemberCosts, *, end_ns: int) -> Claims:
    """Weigh the members of all steps of a window that ends at `end_ns`, each step by its part in it."""
    rows = [share.step.rows for share in shares]
    sizes = [len(one.request_ids) for one in rows]
    request_ids, of_row = _numbered([one.request_ids for one in rows])
    num_requests, num_rows = len(request_ids), len(of_row)

    def column(values: Iterable[Iterable[float]]) -> Column:
        return np.fromiter(chain.from_iterable(values), np.float64, num_rows)

    def by_request(values: Column) -> Column:
        return np.bincount(of_row, weights=values, minlength=num_requests).astype(np.float64, copy=False)

    context = column([one.context_tokens for one in rows])
    new = np.ones(num_rows)
    for one, end in zip(rows, accumulate(sizes), strict=True):
        if not one.has_a_token_each:
            new[end - len(one.new_tokens) : end] = one.new_tokens
    flops, octets = costs.flops(new, context), costs.octets(new, context)
    per_step = [_charged(share, end_ns) for share in shares]
    flop, octet, each, static_flop, static_octet, static_each, ran_ns, ended_ns = np.repeat(
        np.array(per_step).reshape(-1, len(FREE) + 2).T, sizes, axis=1
    )
    weight = flop * flops + octet * octets + each
    none = np.zeros(num_requests)
    prefill = wasted = none
    if any(any(one.is_prefill) for one in rows):
        prefill = by_request(weight * column(one.is_prefill for one in rows))
    if any(any(one.wasted_tokens) for one in rows):
        wasted = by_request(weight * column(one.wasted_tokens for one in rows) / np.maximum(new, 1.0))
    return Claims(
        request_ids=request_ids,
        weight=by_request(weight),
        prefill=prefill,
        static=by_request(static_flop * flops + static_octet * octets + static_each),
        wasted=wasted,
        ran_ns=by_request(ran_ns).astype(np.int64).tolist(),
        ended_ns=by_request(ended_ns).astype(np.int64).tolist(),
    )


def _charged(share: Share, end_ns: int) -> tuple[float, ...]:
    """The prices of a step for its part in a window; its time there; all of its time if it ended there."""
    step = share.step
    part = (share.ran_ns + share.waited_ns) / step.duration_ns
    flop, octet, each, static_flop, static_octet, static_each = step.price
    return (
        *(part * flop, part * octet, part * each),
        *(part * static_flop, part * static_octet, part * static_each),
        *(share.ran_ns, step.duration_ns if step.end_ns <= end_ns else 0),
    )


def _numbered(id_rows: Sequence[tuple[int, ...]]) -> tuple[list[int], NDArray[np.intp]]:
    """The different ids, and for each row which of them it is. Most steps have the members of the last."""
    numbers: dict[int, int] = {}
    of_rows: list[NDArray[np.intp]] = [np.empty(0, dtype=np.intp)]
    last: tuple[int, ...] = ()
    for ids in id_rows:
        if ids != last:
            last = ids
            new_ids = dict.fromkeys([one for one in ids if one not in numbers])
            numbers.update(zip(new_ids, count(len(numbers)), strict=False))
            of_step = np.array([numbers[one] for one in ids], dtype=np.intp)
        of_rows.append(of_step)
    return list(numbers), np.concatenate(of_rows)


def weigh_member(step: Step, request_id: int, costs: MemberCosts) -> tuple[float, bool]:
    """The weight of one member of a whole step, and whether it was prefilled there."""
    rows, price = step.rows, step.price
    index = rows.request_ids.index(request_id)
    new, context = rows.new_tokens[index], rows.context_tokens[index]
    weight = price.flop * costs.flops(new, context) + price.octet * costs.octets(new, context) + price.each
    return weight, rows.is_prefill[index]
