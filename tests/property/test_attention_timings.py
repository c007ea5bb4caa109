"""Whatever the times, varlen is chosen only where it gains, and faster varlen is never chosen less."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.attention_choice import NEVER_NS, AttentionChoice, Timing, pick_faster

TIMES = st.tuples(st.integers(1, 10**9), st.one_of(st.integers(1, 10**9), st.just(NEVER_NS)))


@st.composite
def timings(draw: st.DrawFn) -> list[Timing]:
    """Of a chunk, then of batches of distinct sizes in any order."""
    sizes = draw(st.lists(st.integers(1, 4096), min_size=1, max_size=6, unique=True))
    return [
        Timing(rows=rows, triton_ns=triton_ns, varlen_ns=varlen_ns)
        for rows, (triton_ns, varlen_ns) in ((rows, draw(TIMES)) for rows in (0, *sizes))
    ]


def pick(measured: list[Timing]) -> AttentionChoice:
    chunk, *decodes = measured
    return pick_faster(decodes, chunk)


@settings(derandomize=True)
@given(timings())
def test_varlen_is_chosen_only_where_it_is_a_tenth_faster(measured: list[Timing]) -> None:
    choice = pick(measured)
    for timing in measured:
        is_chosen = choice.has_varlen_decode(timing.rows) if timing.rows else choice.varlen_chunks
        assert not is_chosen or timing.varlen_ns <= 0.9 * timing.triton_ns
    assert choice.varlen_rows in (None, *(timing.rows for timing in measured[1:]))
    largest = max(measured[1:], key=lambda one: one.rows)
    assert choice.has_varlen_decode(largest.rows) == largest.has_gain


@settings(derandomize=True)
@given(timings(), st.integers(1, 1000))
def test_a_clock_of_another_speed_changes_nothing(measured: list[Timing], factor: int) -> None:
    scaled = [
        replace(one, triton_ns=one.triton_ns * factor, varlen_ns=one.varlen_ns * factor) for one in measured
    ]
    first, second = pick(measured), pick(scaled)
    assert (first.varlen_rows, first.varlen_chunks) == (second.varlen_rows, second.varlen_chunks)


@settings(derandomize=True)
@given(timings(), st.data())
def test_a_faster_varlen_serves_no_fewer_batches(measured: list[Timing], data: st.DataObject) -> None:
    faster = [replace(one, varlen_ns=data.draw(st.integers(1, one.varlen_ns))) for one in measured]
    before, after = pick(measured), pick(faster)
    assert after.varlen_chunks or not before.varlen_chunks
    if before.varlen_rows is not None:
        assert after.varlen_rows is not None and after.varlen_rows <= before.varlen_rows
