"""Reads of a counter that moves by itself: few, never late, and sharp once its period is known."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.energy.edge_lock import EdgeLock

MS = 1_000_000
POLL_NS = 50 * MS
GAP_NS = 100 * MS
SECOND_NS = 1_000 * MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A counter for a while: it moves every `period_ms`, or not at all; `phase` of a period late at first."""

    lasts_ms: int
    period_ms: float | None
    phase: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`found` are (edge, when it was read, where the lock says it was) of the last edge of each such read."""

    edges_ns: Sequence[int]
    reads_ns: Sequence[int]
    found: Sequence[tuple[int, int, int]]
    period_ns: int | None


stretches = st.builds(
    Stretch,
    lasts_ms=st.integers(50, 20_000),
    period_ms=st.none() | st.floats(10.0, 240.0),
    phase=st.floats(0.0, 1.0),
)


def edges_of(parts: Sequence[Stretch]) -> list[int]:
    edges_ns, start_ns = [], 0
    for part in parts:
        end_ns = start_ns + part.lasts_ms * MS
        if part.period_ms is not None:
            at_ns = start_ns + part.phase * part.period_ms * MS
            while at_ns < end_ns:
                edges_ns.append(round(at_ns))
                at_ns += part.period_ms * MS
        start_ns = end_ns
    return edges_ns


def read_as_told(
    parts: Sequence[Stretch],
    late_ms: Sequence[float] = (0.1,),
    gap_ns: int = GAP_NS,
    asks_ns: Sequence[int] = (),
) -> Run:
    """Every read comes `late_ms` after it was due, in turn. Between `asks_ns` an edge is wanted each
    `gap_ns`, and the next one after each of them."""
    edges_ns, end_ns = edges_of(parts), sum(part.lasts_ms for part in parts) * MS
    lock = EdgeLock(poll_ns=POLL_NS, now_ns=0)
    reads_ns: list[int] = []
    found: list[tuple[int, int, int]] = []
    now_ns = num_seen = last_ns = num_asked = 0
    while now_ns < end_ns:
        is_asked = num_asked > 0 and asks_ns[num_asked - 1] > last_ns
        due_ns = lock.due_ns(now_ns, after_ns=last_ns + (min(gap_ns, GAP_NS) if is_asked else gap_ns))
        if num_asked < len(asks_ns) and asks_ns[num_asked] < due_ns:
            now_ns, num_asked = max(now_ns, asks_ns[num_asked]), num_asked + 1
            continue
        now_ns = max(now_ns + 1, due_ns) + round(late_ms[len(reads_ns) % len(late_ms)] * MS)
        num_moved = bisect_right(edges_ns, now_ns)
        if num_moved > num_seen:
            last_ns = lock.edge_ns(now_ns)
            found.append((edges_ns[num_moved - 1], now_ns, last_ns))
        lock.note(now_ns, has_moved=num_moved > num_seen)
        num_seen = num_moved
        reads_ns.append(now_ns)
    return Run(edges_ns=edges_ns, reads_ns=reads_ns, found=found, period_ns=lock.period_ns)


def steady(period_ms: float, seconds: int = 20) -> Stretch:
    return Stretch(lasts_ms=1000 * seconds, period_ms=period_ms, phase=0.37)


@given(st.lists(stretches, min_size=1, max_size=6), st.lists(st.floats(0.0, 20.0), min_size=1, max_size=9))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_whatever_the_counter_does_it_is_read_in_time_and_not_too_often(
    parts: list[Stretch], late_ms: list[float]
) -> None:
    run = read_as_told(parts, late_ms)
    assert all(later_ns - earlier_ns >= 3 * MS for earlier_ns, later_ns in pairwise(run.reads_ns))
    for earlier_ns, later_ns in pairwise([0, *run.reads_ns]):
        # A gap, one period of the slowest counter, and the lateness of the reads themselves.
        assert later_ns - earlier_ns <= GAP_NS + 250 * MS + 2 * 20 * MS
    for start in range(0, run.reads_ns[-1], 10 * SECOND_NS):
        num_reads = bisect_right(run.reads_ns, start + 10 * SECOND_NS) - bisect_right(run.reads_ns, start)
        # 20 a second when blind, 36 on fast edges when locked, and up to three scans of 174.
        assert num_reads <= 10 * 36 + 3 * 175


@given(st.lists(stretches, min_size=1, max_size=6), st.lists(st.floats(0.0, 20.0), min_size=1, max_size=9))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_an_edge_lies_between_the_last_read_and_the_one_that_found_it(
    parts: list[Stretch], late_ms: list[float]
) -> None:
    run = read_as_told(parts, late_ms)
    before_ns = dict(zip(run.reads_ns, [0, *run.reads_ns], strict=False))
    for _, read_ns, told_ns in run.found:
        assert before_ns[read_ns] <= told_ns <= read_ns


@given(st.floats(60.0, 230.0), st.floats(0.0, 1.0))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_of_a_steady_counter_edges_are_known_to_milliseconds_by_hardly_more_than_one_read_each(
    period_ms: float, phase: float
) -> None:
    run = read_as_told([Stretch(lasts_ms=20_000, period_ms=period_ms, phase=phase)])
    assert run.period_ns is not None
    assert abs(run.period_ns - period_ms * MS) < 2 * MS
    late = [one for one in run.found if one[1] > 5 * SECOND_NS]
    errors_ns = sorted(abs(edge_ns - told_ns) for edge_ns, _, told_ns in late)
    assert errors_ns[int(0.95 * len(errors_ns))] <= 4 * MS
    num_reads = len(run.reads_ns) - bisect_right(run.reads_ns, 5 * SECOND_NS)
    assert num_reads <= 1.5 * len(late)


def test_a_fast_counter_is_read_once_a_gap_and_its_edges_are_young() -> None:
    run = read_as_told([steady(20.0)])
    late = [one for one in run.found if 5 * SECOND_NS < one[1] < 19 * SECOND_NS]
    assert max(abs(edge_ns - told_ns) for edge_ns, _, told_ns in late) <= 12 * MS
    assert len(late) <= 14 * 10 + 1


@pytest.mark.parametrize("period_ms", [62.0, 100.0, 143.0])
@pytest.mark.parametrize("gap_ns", [SECOND_NS // 2, SECOND_NS])
def test_where_edges_are_wanted_rarely_two_reads_make_one_and_the_lock_holds(
    gap_ns: int, period_ms: float
) -> None:
    run = read_as_told([steady(period_ms, 30)], gap_ns=gap_ns)
    late = [one for one in run.reads_ns if one > 15 * SECOND_NS]
    assert len(late) <= 3 * 15 * SECOND_NS / gap_ns
    found = [one for one in run.found if 5 * SECOND_NS < one[1] < 29 * SECOND_NS]
    errors_ns = [abs(edge_ns - told_ns) for edge_ns, _, told_ns in found]
    assert max(errors_ns) <= 8 * MS


def waits_for_asked_edges_ns(period_ms: float, pauses_ms: Sequence[int]) -> list[int]:
    """From the first edge behind each ask to the read that told it; asks begin after 5 s."""
    asks_ns = [5 * SECOND_NS + one * MS for one in accumulate(pauses_ms)]
    run = read_as_told([steady(period_ms, 34)], gap_ns=SECOND_NS // 2, asks_ns=asks_ns)
    return [
        min(read_ns for _, read_ns, told_ns in run.found if told_ns >= ask_ns)
        - run.edges_ns[bisect_left(run.edges_ns, ask_ns)]
        for ask_ns in asks_ns
    ]


@given(st.floats(60.0, 230.0), st.lists(st.integers(200, 900), min_size=30, max_size=30))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_an_edge_that_is_asked_for_comes_at_the_latest_with_the_next_one(
    period_ms: float, pauses_ms: list[int]
) -> None:
    """Also where asks keep time with the counter, so that its edges are hardly ever seen from both sides."""
    assert max(waits_for_asked_edges_ns(period_ms, pauses_ms)) <= (period_ms + 50) * MS


def test_edges_that_are_asked_for_at_random_are_mostly_read_when_they_are_there() -> None:
    draw = random.Random(7)
    waits_ns = sorted(
        wait_ns
        for _ in range(40)
        for wait_ns in waits_for_asked_edges_ns(
            draw.uniform(60.0, 230.0), [draw.randint(200, 900) for _ in range(30)]
        )
    )
    assert waits_ns[int(0.5 * len(waits_ns))] <= 3 * MS
    assert waits_ns[int(0.9 * len(waits_ns))] <= 13 * MS


def test_a_counter_that_changes_its_period_jumps_or_stands_still_is_locked_again() -> None:
    for change in (
        Stretch(lasts_ms=8_000, period_ms=140.0, phase=0.0),
        Stretch(lasts_ms=8_000, period_ms=100.0, phase=0.5),
        Stretch(lasts_ms=8_000, period_ms=None, phase=0.0),
    ):
        run = read_as_told([steady(100.0, 12), change, steady(100.0, 40)])
        assert run.period_ns is not None
        assert abs(run.period_ns - 100 * MS) < 2 * MS
        last = [one for one in run.found if one[1] > run.reads_ns[-1] - 5 * SECOND_NS]
        assert max(abs(edge_ns - told_ns) for edge_ns, _, told_ns in last) <= 5 * MS


def test_a_counter_without_rhythm_is_read_blindly_every_poll() -> None:
    edges = [Stretch(lasts_ms=40 + 37 * (k * k % 7), period_ms=300.0, phase=0.0) for k in range(300)]
    run = read_as_told(edges)
    assert max(read_ns - edge_ns for edge_ns, read_ns, _ in run.found) <= POLL_NS + MS
