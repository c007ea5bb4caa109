"""What the ledger promises of the host beside its devices: conserved to the millijoule, and in no bill."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.energy.ledger import Ledger, RequestJoules
from replicas.energy.meter import Reading
from tests.random_ledgers import World, make_edges, make_ledger, make_readings, make_world

SEEDS = st.integers(0, 2**48)


def with_host(random: Random, readings: list[Reading], *, breaks: bool) -> tuple[list[Reading], int]:
    """The readings with a host's count, which may break, and what the host drew in windows that know."""
    host_mj, known_mj, told = 0, 0, []
    was_known = False
    for reading in readings:
        drawn_mj = random.choice((0, random.randint(0, 9), random.randint(0, 20_000)))
        is_known = not (breaks and random.random() < 0.2)
        has_gap = breaks and random.random() < 0.1
        host_mj = host_mj + drawn_mj if was_known and is_known else 0
        known_mj += drawn_mj if was_known and is_known and not has_gap else 0
        told.append(replace(reading, host_mj=host_mj if is_known else None, gap=has_gap))
        was_known = is_known
    return told, known_mj


def settle(world: World, readings: list[Reading]) -> tuple[Ledger, list[RequestJoules]]:
    ledger = make_ledger()
    ledger.add_reading(readings[0])
    for step in world.steps:
        ledger.add_step(step)
    for request_id in world.ids:
        ledger.end_request(request_id, 0)
    for reading in readings[1:]:
        ledger.add_reading(reading)
    ledger.advance(readings[-1].t_ns)
    return ledger, ledger.take_closed()


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_requests_and_rest_are_the_host_meter_and_bills_are_as_without_it(seed: int) -> None:
    random = Random(seed)
    world = make_world(random)
    bare = make_readings(world, make_edges(random, world.end_ms))
    readings, drawn_mj = with_host(random, bare, breaks=False)
    ledger, bills = settle(world, readings)
    host = ledger.host_totals()
    hosts_mj = [bill.host_mj for bill in bills]
    assert host.meter_mj == drawn_mj
    assert sum(mj for mj in hosts_mj if mj is not None) + host.rest_mj == drawn_mj
    assert None not in hosts_mj
    assert min(host.rest_mj, host.requests_mj) >= 0
    _, without = settle(world, bare)
    assert [replace(bill, host_mj=None) for bill in bills] == without
    for bill in bills:
        assert 0 <= (bill.host_mj or 0) <= drawn_mj


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_a_host_that_comes_and_goes_is_conserved_where_it_is_known(seed: int) -> None:
    random = Random(seed)
    world = make_world(random)
    readings, known_mj = with_host(
        random, make_readings(world, make_edges(random, world.end_ms)), breaks=True
    )
    ledger, bills = settle(world, readings)
    host = ledger.host_totals()
    assert (host.meter_mj, host.requests_mj + host.rest_mj) == (known_mj, known_mj)
    assert sum(bill.host_mj or 0 for bill in bills) <= host.requests_mj + len(bills)


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_a_host_as_its_devices_is_divided_as_they_are(seed: int) -> None:
    random = Random(seed)
    world = make_world(random)
    readings = [
        replace(one, host_mj=3 * one.energy_mj)
        for one in make_readings(world, make_edges(random, world.end_ms))
    ]
    _, bills = settle(world, readings)
    for bill in bills:
        assert bill.host_mj is not None
        assert abs(bill.host_mj - 3 * bill.total_mj) <= 3
