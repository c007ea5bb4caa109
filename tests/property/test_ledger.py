"""What the step ledger promises whatever happens: conservation first, then fairness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.energy.ledger import Ledger, RequestJoules
from replicas.energy.meter import Reading, Source
from replicas.energy.weights import CPU_COEFFICIENTS, GPU_COEFFICIENTS, DeviceCoefficients
from replicas.energy.window import Step, Window, partition
from replicas.request import StepRecord, StepRows
from tests.random_ledgers import IDLE_W, MS, World, make_edges, make_ledger, make_readings, make_world

SEEDS = st.integers(0, 2**48)


def settle(
    world: World,
    readings: Sequence[Reading],
    *,
    coefficients: DeviceCoefficients = GPU_COEFFICIENTS,
    lost: frozenset[int] = frozenset(),
) -> tuple[Ledger, dict[int, RequestJoules]]:
    """All steps but the `lost` ones, then all readings: what the ledger makes of a run."""
    ledger = make_ledger(coefficients)
    ledger.add_reading(readings[0])
    for step in world.steps:
        if step.step not in lost:
            ledger.add_step(step)
    for request_id in world.ids:
        ledger.end_request(request_id, 0)
    for reading in readings[1:]:
        ledger.add_reading(reading)
    ledger.advance(readings[-1].t_ns)
    return ledger, {bill.request_id: bill for bill in ledger.take_closed()}


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_p3_equal_work_costs_equal_joules(seed: int) -> None:
    random = Random(seed)
    world = make_world(random)
    steps = []
    for step in world.steps:
        twins = [step.members[0]._replace(request_id=request_id) for request_id in (100, 101)]
        random.shuffle(twins)
        steps.append(replace(step, rows=StepRows.of([*step.members, *twins])))
    twin_world = replace(world, steps=tuple(steps))
    readings = make_readings(twin_world, make_edges(random, world.end_ms))
    _, bills = settle(twin_world, readings)
    assert abs(bills[100].total_mj - bills[101].total_mj) <= 1
    assert abs(bills[100].static_mj - bills[101].static_mj) <= 1


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_p4_a_request_that_never_ran_pays_nothing(seed: int) -> None:
    random = Random(seed)
    world = make_world(random)
    ledger = make_ledger()
    readings = make_readings(world, make_edges(random, world.end_ms))
    ledger.begin_request(99)
    ledger.add_reading(readings[0])
    for step in world.steps:
        ledger.add_step(step)
    for reading in readings[1:]:
        ledger.add_reading(reading)
        ledger.advance(reading.t_ns)
    ledger.end_request(99, 0)
    bills = {bill.request_id: bill.total_mj for bill in ledger.take_closed()}
    assert bills[99] == 0


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_p5_splitting_windows_leaves_the_totals_unchanged(seed: int) -> None:
    random = Random(seed)
    world = make_world(random)
    coarse = make_edges(random, world.end_ms)
    fine = sorted({*coarse, *(random.randint(0, world.end_ms) for _ in range(40))})
    coarse_totals = settle(world, make_readings(world, coarse))[0].totals()
    fine_totals = settle(world, make_readings(world, fine))[0].totals()
    assert coarse_totals.meter_mj == fine_totals.meter_mj
    assert coarse_totals.idle_mj == fine_totals.idle_mj
    assert coarse_totals.requests_mj == fine_totals.requests_mj


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.sampled_from((CPU_COEFFICIENTS, GPU_COEFFICIENTS)))
def test_p7_without_idle_time_twice_the_meter_is_twice_the_bill(
    seed: int, device: DeviceCoefficients
) -> None:
    random = Random(seed)
    world = make_world(random, has_idle=False)
    edges = make_edges(random, world.end_ms)
    _, once = settle(world, make_readings(world, edges), coefficients=device)
    _, twice = settle(world, make_readings(world, edges, scale=2), coefficients=device)
    for request_id, bill in once.items():
        assert abs(twice[request_id].total_mj - 2 * bill.total_mj) <= 3


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_p8_names_and_order_do_not_matter(seed: int) -> None:
    random = Random(seed)
    world = make_world(random)
    names = {request_id: 1000 - 7 * request_id for request_id in world.ids}
    steps = [relabel(random, step, names) for step in world.steps]
    readings = make_readings(world, make_edges(random, world.end_ms))
    _, bills = settle(world, readings)
    random.shuffle(steps)
    _, renamed = settle(replace(world, steps=tuple(steps), powers_w=world.powers_w), readings)
    for request_id, bill in bills.items():
        assert abs(renamed[names[request_id]].total_mj - bill.total_mj) <= 1


def relabel(random: Random, step: StepRecord, names: Mapping[int, int]) -> StepRecord:
    members = [member._replace(request_id=names[member.request_id]) for member in step.members]
    random.shuffle(members)
    return replace(step, rows=StepRows.of(members))


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_p9_a_request_alone_pays_all_busy_energy(seed: int) -> None:
    random = Random(seed)
    world = make_world(random, num_requests=1)
    ledger, bills = settle(world, make_readings(world, make_edges(random, world.end_ms)))
    totals = ledger.totals()
    busy_ms = (world.steps[-1].end_ns - world.steps[0].start_ns) // MS
    assert bills[0].total_mj == totals.requests_mj
    assert totals.idle_mj == IDLE_W * (world.end_ms - busy_ms)


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_p11_lost_steps_only_raise_unattributed(seed: int) -> None:
    """A missing number in the middle of a run tells of the loss; nobody else's bill rises by it."""
    random = Random(seed)
    world = make_world(random)
    known: set[int] = set()
    candidates = []
    for step in world.steps[:-1]:
        ids = {member.request_id for member in step.members}
        if ids <= known:
            candidates.append(step.step)
        known |= ids
    lost = frozenset(number for number in candidates if random.random() < 0.3)
    readings = make_readings(world, make_edges(random, world.end_ms))
    whole, bills = settle(world, readings)
    holed, holed_bills = settle(world, readings, lost=lost)
    for request_id, bill in holed_bills.items():
        assert bill.total_mj <= bills[request_id].total_mj + 1
    assert holed.totals().unattributed_mj >= whole.totals().unattributed_mj
    assert holed.totals().idle_mj <= whole.totals().idle_mj
    assert (holed.totals().unattributed_mj > 0) == bool(lost)


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_p12_busy_idle_and_holes_cover_every_instant_once(seed: int) -> None:
    random = Random(seed)
    steps = sorted(
        (
            Step(start_ns, start_ns + random.randint(0, 60), number)
            for number, start_ns in enumerate(sorted(random.randint(0, 400) for _ in range(12)))
            if random.random() < 0.8
        ),
        key=lambda step: step.start_ns,
    )
    window = Window(start_ns=100, end_ns=300, delta_mj=0, source=Source.COUNTER, static_mj=None, gap=False)
    before = random.choice((None, Step(0, 90, -1)))
    part = partition(window, steps, before=before, is_continued=lambda _: random.random() < 0.5)
    assert part.busy_ns + part.idle_ns + part.hole_ns == window.width_ns
    instants = sum(any(step.start_ns <= t < step.end_ns for step in steps) for t in range(100, 300))
    waited_ns = sum(share.waited_ns for share in part.shares)
    assert part.busy_ns == instants + waited_ns
    assert min(part.busy_ns, part.idle_ns, part.hole_ns) >= 0


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_joules_of_all_steps_reach_the_requests_of_those_steps(seed: int) -> None:
    """Windows that end with the steps: each step's own energy is what its members pay together."""
    random = Random(seed)
    world = make_world(random, num_requests=6, has_idle=False)
    solo = [replace(step, rows=StepRows.of(step.members[:1])) for step in world.steps]
    edges = [0, *(step.end_ns // MS for step in world.steps)]
    solo_world = replace(world, steps=tuple(solo))
    _, bills = settle(solo_world, make_readings(solo_world, edges))
    expected: dict[int, int] = {}
    for step, (start_ms, end_ms) in zip(solo, pairwise(edges), strict=True):
        request_id = step.members[0].request_id
        energy_mj = world.energy_mj(end_ms) - world.energy_mj(start_ms)
        expected[request_id] = expected.get(request_id, 0) + energy_mj
    assert {request_id: bill.total_mj for request_id, bill in bills.items()} == expected
