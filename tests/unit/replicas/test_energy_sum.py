"""Several hosts' meters on one clock: what is summed when, and how far another host's clock is from ours."""

from __future__ import annotations

import pytest

from replicas.energy import meter_sum as module
from replicas.energy.host_clock import HostClock
from replicas.energy.meter import Reading, Source
from replicas.energy.meter_sum import MeterSum


def edge(t_ns: int, energy_mj: int, *, gap: bool = False, source: Source = Source.COUNTER) -> Reading:
    return Reading(t_ns=t_ns, energy_mj=energy_mj, source=source, gap=gap)


def test_the_sum_has_an_edge_where_the_slowest_meter_has_one() -> None:
    meter_sum = MeterSum(2)
    assert meter_sum.add(0, edge(100, 10)) is None
    assert meter_sum.add(0, edge(200, 30)) is None
    begun = meter_sum.add(1, edge(150, 1000))
    assert begun is not None
    assert (begun.t_ns, begun.energy_mj) == (150, 1020)
    assert meter_sum.add(0, edge(300, 40)) is None
    following = meter_sum.add(1, edge(250, 1500))
    assert following is not None
    assert (following.t_ns, following.energy_mj) == (250, 1535)


def test_it_begins_where_the_last_meter_begins() -> None:
    meter_sum = MeterSum(2)
    assert meter_sum.add(0, edge(500, 7)) is None
    assert meter_sum.add(1, edge(100, 1)) is None
    assert meter_sum.add(1, edge(400, 2)) is None
    begun = meter_sum.add(1, edge(600, 4))
    assert begun is not None
    assert (begun.t_ns, begun.energy_mj) == (500, 10)


def test_it_is_as_uncertain_as_its_least_certain_meter() -> None:
    meter_sum = MeterSum(2)
    meter_sum.add(0, edge(100, 1, source=Source.POWER_INTEGRATED))
    found = meter_sum.add(1, edge(100, 1))
    assert found is not None
    assert found.source is Source.POWER_INTEGRATED


def test_an_edge_out_of_order_is_counted_by_the_next_and_owes_its_gap() -> None:
    meter_sum = MeterSum(1)
    meter_sum.add(0, edge(100, 1))
    assert meter_sum.add(0, edge(90, 50, gap=True)) is None
    found = meter_sum.add(0, edge(200, 60))
    assert found is not None
    assert (found.energy_mj, found.gap) == (60, True)


def test_what_a_silent_meter_makes_wait_is_bounded_and_keeps_its_gaps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_EDGES_KEPT", 4)
    meter_sum = MeterSum(2)
    meter_sum.add(0, edge(0, 0))
    meter_sum.add(1, edge(0, 0))
    for number in range(1, 100):
        assert meter_sum.add(0, edge(number * 10, number, gap=number == 2)) is None
    found = meter_sum.add(1, edge(985, 5))
    assert found is not None
    assert (found.t_ns, found.energy_mj, found.gap) == (985, 98 + 5, True)


def test_the_best_answer_tells_anothers_clock() -> None:
    clock = HostClock()
    assert not clock.is_known
    clock.note(asked_ns=1000, theirs_ns=51_500, answered_ns=2000)
    assert clock.to_ours(51_500) == 1500
    clock.note(asked_ns=5000, theirs_ns=55_600, answered_ns=9000)
    assert clock.to_ours(51_500) == 1500, "a worse answer changes nothing"
    clock.note(asked_ns=10_000, theirs_ns=60_150, answered_ns=10_100)
    assert clock.to_ours(60_150) == 10_050
    assert clock.error_ns(10_100) == 50


def test_an_old_answer_gives_way_since_clocks_drift() -> None:
    clock = HostClock()
    clock.note(asked_ns=0, theirs_ns=0, answered_ns=100)
    minute_ns = 60 * 10**9
    clock.note(asked_ns=minute_ns, theirs_ns=minute_ns + 2_500_000, answered_ns=minute_ns + 1_000_000)
    assert clock.to_ours(minute_ns + 2_500_000) == minute_ns + 500_000
