"""Windows between edges of the counter, the work done in them, and what that makes in joules per token."""

from __future__ import annotations

import pytest

from bench.gpu_check.energy_trace import EnergyTrace, EnergyWindow, done_at, widest_window
from bench.gpu_check.steady_load import LoadResult

EDGES = [(0.0, 1_000), (0.1, 31_000), (0.2, 61_000), (0.3, 92_000)]


def test_a_window_begins_and_ends_at_edges() -> None:
    assert widest_window(EDGES, 0.05, 0.35) == EnergyWindow(start_s=0.1, end_s=0.3, energy_j=61.0)


def test_fewer_than_two_edges_are_no_window() -> None:
    assert widest_window(EDGES, 0.05, 0.15) is None


def test_work_is_interpolated_between_marks() -> None:
    marks = [(0.0, 0.0), (1.0, 100.0), (3.0, 200.0)]
    assert [done_at(marks, at_s) for at_s in (-1.0, 0.5, 1.0, 2.0, 9.0)] == [0.0, 50.0, 100.0, 150.0, 200.0]


def test_joules_split_into_static_and_dynamic() -> None:
    window = EnergyWindow(start_s=1.0, end_s=3.0, energy_j=800.0)
    result = LoadResult(tokens_per_s=100.0, window=window, window_tokens=200.0)
    assert result.energy_row(idle_w=100.0) == {
        "watts": 400.0,
        "j_per_token": 4.0,
        "j_per_token_static": 1.0,
        "j_per_token_dynamic": 3.0,
    }


def test_without_a_window_no_joule_is_claimed() -> None:
    assert LoadResult(tokens_per_s=100.0).energy_row(idle_w=100.0) == {}


def test_a_trace_keeps_the_moments_the_counter_moved() -> None:
    values = iter([5, 5, 7, 7, 7, 9])
    last = 9

    def counter() -> int:
        return next(values, last)

    trace = EnergyTrace(counter, period_s=0.0001)
    with trace:
        while trace.num_polls < 8:
            pass
    assert [energy_mj for _, energy_mj in trace.edges] == [7, 9]


@pytest.mark.parametrize("edges", [[], [(0.0, 1)]])
def test_no_edges_no_window(edges: list[tuple[float, int]]) -> None:
    assert widest_window(edges, 0.0, 1.0) is None
