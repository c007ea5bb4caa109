"""Who did how much in one meter window, in the weights of `weights.py`: sums by request. Pure.

The steps of a window are priced and weighed together: a window holds a thousand rows, a step only some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from struct import pack

import numpy as np
from numpy.typing import NDArray

from replicas.energy.weights import Column, DeviceCoefficients, MemberCosts, StepRows, StepWork, price_steps
from replicas.energy.window import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """A number for each request, at the place that `place_of` says; 0 for those in no step of the window.

    `prefill`, `static` and `wasted` are parts of `weight`. `ran_ns` is the time of its steps inside the
    window, `ended_ns` the whole duration of those that ended in it. `work` is that of all of them.
    """

    weight: Column
    prefill: Column
    static: Column
    wasted: Column
    ran_ns: Column
    ended_ns: Column
    work: StepWork


def claims_of(
    shares: Sequence[Share],
    costs: MemberCosts,
    device: DeviceCoefficients,
    *,
    end_ns: int,
    place_of: Callable[[int], int],
) -> Claims:
    """Weigh the members of all steps of a window that ends at `end_ns`, each step by its part in it."""
    rows = [share.step.rows for share in shares]
    times = np.array([_times(share, end_ns) for share in shares], dtype=np.float64).T
    part, seconds, experts_hit, num_members = times[2:]
    sizes = num_members.astype(np.intp)
    begins = sizes.cumsum() - sizes
    places = _places(rows, place_of)
    context = _integers(list(chain.from_iterable([one.context_tokens for one in rows]))).astype(np.float64)
    new = np.ones(len(places))
    for begin, one in zip(begins.tolist(), rows, strict=True):
        if one.new_tokens.count(1) != len(one.new_tokens):
            for index, tokens in enumerate(one.new_tokens):
                if tokens != 1:
                    new[begin + index] = tokens
    flops, octets = costs.flops(new, context), costs.octets(new, context)
    weight_bytes = costs.weight_bytes(experts_hit)
    step_flops, step_octets = np.add.reduceat(flops, begins), np.add.reduceat(octets, begins)
    prices = price_steps(
        seconds=seconds,
        flops=step_flops,
        octets=step_octets,
        weight_bytes=weight_bytes,
        num_members=num_members,
        device=device,
    )
    ran_ns, ended_ns = times[:2].repeat(sizes, axis=1)
    flop, octet, each, static_flop, static_octet, static_each = (part * prices).repeat(sizes, axis=1)
    weight = flop * flops + octet * octets + each
    static = static_flop * flops + static_octet * octets + static_each
    num_places = int(places.max()) + 1

    prefilled, _ = _marked([one.is_prefill for one in rows])
    wasted, wasted_tokens = _marked([one.wasted_tokens for one in rows])
    wasted_weight = weight[wasted] * wasted_tokens / np.maximum(new[wasted], 1.0)
    return Claims(
        weight=_by_place(places, weight, num_places),
        prefill=_by_place(places[prefilled], weight[prefilled], num_places),
        static=_by_place(places, static, num_places),
        wasted=_by_place(places[wasted], wasted_weight, num_places),
        ran_ns=_by_place(places, ran_ns, num_places),
        ended_ns=_by_place(places, ended_ns, num_places),
        work=StepWork(
            float(part @ seconds), float(part @ step_flops), float(part @ (step_octets + weight_bytes))
        ),
    )


def _by_place(places: NDArray[np.int64], values: Column, num_places: int) -> Column:
    return np.bincount(places, weights=values, minlength=num_places).astype(np.float64, copy=False)


def _times(share: Share, end_ns: int) -> tuple[float, ...]:
    """Of a step: its time in the window, all of its time if it ended there, and the part that is charged."""
    step, ran_ns, waited_ns = share
    duration_ns = step.duration_ns
    ended_ns = duration_ns if step.end_ns <= end_ns else 0
    part = (ran_ns + waited_ns) / duration_ns
    return ran_ns, ended_ns, part, duration_ns * 1e-9, step.experts_hit, len(step.rows.request_ids)


def _places(rows: Sequence[StepRows], place_of: Callable[[int], int]) -> NDArray[np.int64]:
    """Of the request of each row. Most steps have the members of the last."""
    of_rows: list[NDArray[np.int64]] = []
    last: tuple[int, ...] = ()
    for one in rows:
        if one.request_ids != last:
            last = one.request_ids
            of_step = _integers(list(map(place_of, last)))
        of_rows.append(of_step)
    return np.concatenate(of_rows)


def _integers(values: Sequence[int]) -> NDArray[np.int64]:
    """Read-only. Through `pack`, a third of what numpy takes to read Python's integers one by one."""
    return np.frombuffer(pack(f"{len(values)}q", *values), dtype=np.int64)


def _marked(columns: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """The few rows of all steps that have something other than 0, and what."""
    at: list[int] = []
    values: list[int] = []
    begin = 0
    for column in columns:
        end = begin + len(column)
        if any(column):
            at += compress(range(begin, end), column)
            values += filter(None, column)
        begin = end
    return at, values
