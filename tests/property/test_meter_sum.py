"""The meters of several hosts as one: no joule made or lost, whatever the order and times of their edges."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.energy.meter import Reading, Source
from replicas.energy.meter_sum import MeterSum

SECOND_NS = 10**9


@st.composite
def meters(draw: st.DrawFn) -> list[list[Reading]]:
    """The edges of up to four meters; counts of devices never fall, those of hosts may, or be unknown."""
    return [draw(edges()) for _ in range(draw(st.integers(1, 4)))]


@st.composite
def edges(draw: st.DrawFn) -> list[Reading]:
    t_ns, energy_mj, static_mj = draw(st.integers(0, SECOND_NS)), draw(st.integers(0, 10**6)), 0
    found: list[Reading] = []
    for _ in range(draw(st.integers(1, 8))):
        found.append(
            Reading(
                t_ns=t_ns,
                energy_mj=energy_mj,
                static_mj=static_mj,
                source=draw(st.sampled_from([Source.COUNTER, Source.POWER_INTEGRATED])),
                gap=bool(found) and draw(st.booleans()),
                host_mj=draw(st.none() | st.integers(0, 100)),
            )
        )
        t_ns += draw(st.integers(1, SECOND_NS))
        delta_mj = draw(st.integers(0, 700_000))
        energy_mj, static_mj = energy_mj + delta_mj, static_mj + delta_mj // 2
    return found


def shuffled(draw: st.DataObject, found: list[list[Reading]]) -> list[tuple[int, Reading]]:
    """In any order that keeps each meter's own."""
    order = draw.draw(st.permutations([index for index, one in enumerate(found) for _ in one]))
    left = [iter(one) for one in found]
    return [(index, next(left[index])) for index in order]


def edges_of_the_sum(draw: st.DataObject, found: list[list[Reading]]) -> list[Reading]:
    meter_sum = MeterSum(len(found))
    return [edge for arrival in shuffled(draw, found) if (edge := meter_sum.add(*arrival)) is not None]


def bounds_mj(one: list[Reading], t_ns: int) -> tuple[int, int]:
    """The counts of the edges around an instant."""
    before = max((edge for edge in one if edge.t_ns <= t_ns), key=lambda edge: edge.t_ns)
    after = min((edge for edge in one if edge.t_ns >= t_ns), key=lambda edge: edge.t_ns)
    return before.energy_mj, after.energy_mj


@settings(max_examples=150)
@given(found=meters(), data=st.data())
def test_the_sum_lies_between_the_edges_of_its_meters_and_never_falls(
    found: list[list[Reading]], data: st.DataObject
) -> None:
    made = edges_of_the_sum(data, found)
    for edge in made:
        bounds = [bounds_mj(one, edge.t_ns) for one in found]
        assert sum(low for low, _ in bounds) <= edge.energy_mj <= sum(high for _, high in bounds)
    for earlier, later in pairwise(made):
        assert later.t_ns > earlier.t_ns
        assert later.energy_mj >= earlier.energy_mj
        assert later.static_mj is not None
        assert earlier.static_mj is not None
        assert later.static_mj >= earlier.static_mj
    last_ns = min(one[-1].t_ns for one in found)
    if last_ns >= max(one[0].t_ns for one in found):
        assert made[-1].t_ns == last_ns


@settings(max_examples=100)
@given(found=meters(), data=st.data())
def test_where_all_are_read_at_once_it_is_exact(found: list[list[Reading]], data: st.DataObject) -> None:
    end_ns = max(one[-1].t_ns for one in found) + 1
    ends = [
        Reading(
            t_ns=end_ns, energy_mj=one[-1].energy_mj + 17, source=Source.COUNTER, static_mj=one[-1].static_mj
        )
        for one in found
    ]
    meter_sum = MeterSum(len(found))
    for arrival in shuffled(data, found):
        meter_sum.add(*arrival)
    made = [meter_sum.add(index, end) for index, end in enumerate(ends)]
    assert made[-1] is not None
    assert made[-1].energy_mj == sum(end.energy_mj for end in ends)


@settings(max_examples=100)
@given(found=meters(), data=st.data())
def test_a_gap_of_any_meter_is_a_gap_of_each_window_it_touches(
    found: list[list[Reading]], data: st.DataObject
) -> None:
    made = edges_of_the_sum(data, found)
    spans = [span for one in found for span in pairwise(one)]
    for earlier, later in pairwise(made):
        touched = [end for start, end in spans if start.t_ns < later.t_ns and end.t_ns > earlier.t_ns]
        assert later.gap == any(end.gap for end in touched)


@settings(max_examples=100)
@given(found=meters(), data=st.data())
def test_the_hosts_count_is_told_only_where_none_of_them_began_anew(
    found: list[list[Reading]], data: st.DataObject
) -> None:
    """Else one that fell would hide behind one that rose."""
    made = edges_of_the_sum(data, found)
    spans = [span for one in found for span in pairwise(one)]
    for earlier, later in pairwise(made):
        if later.host_mj is None or earlier.host_mj is None:
            continue
        for start, end in spans:
            if start.t_ns < later.t_ns and end.t_ns > earlier.t_ns:
                assert start.host_mj is not None
                assert end.host_mj is not None
                assert end.host_mj >= start.host_mj
        assert later.host_mj >= earlier.host_mj
