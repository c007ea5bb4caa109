"""What the step ledger promises whatever happens: conservation first, then fairness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.energy.ledger import Ledger, RequestJoules
from replicas.energy.meter import Reading, Source
from replicas.energy.weights import CPU_COEFFICIENTS, GPU_COEFFICIENTS, DeviceCoefficients
from replicas.energy.window import LastStep, Step, Window, partition
from replicas.request import EngineCosts, StepMember, StepRecord

MS = 1_000_000
IDLE_W = 80
COSTS = EngineCosts(
    active_params=8_000_000_000,
    shared_weight_bytes=16_000_000_000,
    expert_bytes=0,
    num_layers=32,
    attention_dim=4096,
    kv_bytes_per_token=131_072,
)
SEEDS = st.integers(0, 2**48)


@dataclass(frozen=True, slots=True)
class World:
    """A run of an engine: its steps in order, with the power drawn in each; all in whole milliseconds."""

    steps: tuple[StepRecord, ...]
    powers_w: tuple[int, ...]
    end_ms: int

    @property
    def ids(self) -> set[int]:
        return {member.request_id for step in self.steps for member in step.members}

    def energy_mj(self, t_ms: int) -> int:
        """Watts times milliseconds are millijoules: exact."""
        total = IDLE_W * t_ms
        for step, power_w in zip(self.steps, self.powers_w, strict=True):
            start_ms, end_ms = step.start_ns // MS, step.end_ns // MS
            total += (power_w - IDLE_W) * max(0, min(end_ms, t_ms) - start_ms)
        return total


def make_world(random: Random, *, num_requests: int = 4, num_steps: int = 24, has_idle: bool = True) -> World:
    steps: list[StepRecord] = []
    powers_w = []
    t_ms = random.randint(0, 50) if has_idle else 0
    for number in range(1, num_steps + 1):
        duration_ms = random.randint(1, 60)
        ids = random.sample(range(num_requests), random.randint(1, num_requests))
        members = tuple(make_member(random, request_id) for request_id in ids)
        end_ms = t_ms + duration_ms
        steps.append(StepRecord(step=number, start_ns=t_ms * MS, end_ns=end_ms * MS, members=members))
        powers_w.append(random.randint(IDLE_W, 700))
        t_ms = end_ms + (random.choice((0, 0, 1, 5, 40, 150)) if has_idle else 0)
    return World(tuple(steps), tuple(powers_w), t_ms + (100 if has_idle else 0))


def make_member(random: Random, request_id: int) -> StepMember:
    is_prefill = random.random() < 0.3
    new_tokens = random.randint(1, 512) if is_prefill else 1
    return StepMember(
        request_id=request_id,
        new_tokens=new_tokens,
        context_tokens=random.randint(0, 4000),
        is_prefill=is_prefill,
        wasted_tokens=random.choice((0, 0, new_tokens // 2)),
    )


def make_edges(random: Random, end_ms: int, *, least_ms: int = 1) -> list[int]:
    edges = [0]
    while edges[-1] < end_ms:
        edges.append(min(end_ms, edges[-1] + random.randint(least_ms, 120)))
    return edges


def make_readings(world: World, edges_ms: Sequence[int], *, scale: int = 1) -> list[Reading]:
    return [
        Reading(t_ns=t_ms * MS, energy_mj=scale * world.energy_mj(t_ms), source=Source.COUNTER)
        for t_ms in edges_ms
    ]


def make_ledger(
    coefficients: DeviceCoefficients = GPU_COEFFICIENTS, idle_power_w: float | None = IDLE_W
) -> Ledger:
    return Ledger(costs=COSTS, idle_power_w=idle_power_w, coefficients=coefficients)


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


def assert_conserved(ledger: Ledger, bills: Sequence[RequestJoules], *, seen_mj: int) -> None:
    totals = ledger.totals()
    assert totals.requests_mj + totals.idle_mj + totals.unattributed_mj == totals.meter_mj
    assert totals.meter_mj + totals.pending_mj == seen_mj
    assert sum(bill.total_mj for bill in bills) == totals.billed_mj
    assert min(totals.requests_mj, totals.idle_mj, totals.unattributed_mj, totals.pending_mj) >= 0


def assert_sane(bill: RequestJoules) -> None:
    assert bill.prefill_mj >= 0
    assert bill.decode_mj >= 0
    assert 0 <= bill.static_mj <= bill.total_mj
    assert 0 <= bill.wasted_mj <= bill.total_mj
    assert bill.confidence_factor >= 1.0


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_p1_p2_every_millijoule_is_somewhere_once_whatever_happens(seed: int) -> None:
    """Random order, late and lost steps, gaps, resets, dropped readings, requests cut off at any time."""
    random = Random(seed)
    world = make_world(random)
    ledger = make_ledger(idle_power_w=random.choice((None, IDLE_W)))
    bills: list[RequestJoules] = []
    events = chaotic_events(random, world)
    last: Reading | None = None
    seen_mj = 0
    live = set(world.ids)
    for arrival_ns, event in events:
        if isinstance(event, StepRecord):
            ledger.add_step(event)
        else:
            if last is None or event.t_ns > last.t_ns:
                seen_mj += max(0, event.energy_mj - last.energy_mj) if last else 0
                last = event
            ledger.add_reading(event)
        if random.random() < 0.8:
            ledger.advance(arrival_ns)
        if live and random.random() < 0.03:
            ledger.end_request(live.pop(), arrival_ns)
        if random.random() < 0.05:
            ledger.lose_steps(start_ns=arrival_ns - 30 * MS, end_ns=arrival_ns)
        bills += ledger.take_closed()
        assert_conserved(ledger, bills, seen_mj=seen_mj)
    assert last is not None
    end_ns = events[-1][0]
    for request_id in sorted(live):
        ledger.end_request(request_id, end_ns)
    ledger.add_reading(replace(last, t_ns=end_ns + MS, gap=False))
    ledger.advance(end_ns + MS)
    bills += ledger.take_closed()
    assert_conserved(ledger, bills, seen_mj=seen_mj)
    assert ledger.totals().pending_mj == 0
    for bill in bills:
        assert_sane(bill)
    assert {bill.request_id for bill in bills} | set(ledger.take_unmeasured()) == world.ids
    assert ledger.totals().billed_mj == ledger.totals().requests_mj


def chaotic_events(random: Random, world: World) -> list[tuple[int, StepRecord | Reading]]:
    events: list[tuple[int, StepRecord | Reading]] = []
    for step in world.steps:
        if random.random() > 0.1:
            late_ms = random.choice((0, 1, 10, 200))
            events.append((step.end_ns + late_ms * MS, step))
    shift_mj = 0
    for t_ms in make_edges(random, world.end_ms + 400):
        is_reset = random.random() < 0.05
        shift_mj -= random.randint(0, 20_000) if is_reset else 0
        reading = Reading(
            t_ns=(t_ms - random.choice((0, 0, 0, 90))) * MS,
            energy_mj=100_000_000 + world.energy_mj(t_ms) + shift_mj,
            source=random.choice((Source.COUNTER, Source.COUNTER, Source.POWER_INTEGRATED)),
            gap=random.random() < 0.1,
        )
        events.append((t_ms * MS, reading))
    return sorted(events, key=lambda event: event[0])


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_p3_equal_work_costs_equal_joules(seed: int) -> None:
    random = Random(seed)
    world = make_world(random)
    steps = []
    for step in world.steps:
        twins = [replace(step.members[0], request_id=request_id) for request_id in (100, 101)]
        random.shuffle(twins)
        steps.append(replace(step, members=(*step.members, *twins)))
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
    members = [replace(member, request_id=names[member.request_id]) for member in step.members]
    random.shuffle(members)
    return replace(step, members=tuple(members))


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
            Step(start_ns, start_ns + random.randint(0, 60), number, ())
            for number, start_ns in enumerate(sorted(random.randint(0, 400) for _ in range(12)))
            if random.random() < 0.8
        ),
        key=lambda step: step.start_ns,
    )
    window = Window(start_ns=100, end_ns=300, delta_mj=0, source=Source.COUNTER, static_mj=None, gap=False)
    before = random.choice((None, LastStep(90, -1)))
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
    solo = [replace(step, members=step.members[:1]) for step in world.steps]
    edges = [0, *(step.end_ns // MS for step in world.steps)]
    solo_world = replace(world, steps=tuple(solo))
    _, bills = settle(solo_world, make_readings(solo_world, edges))
    expected: dict[int, int] = {}
    for step, (start_ms, end_ms) in zip(solo, pairwise(edges), strict=True):
        request_id = step.members[0].request_id
        energy_mj = world.energy_mj(end_ms) - world.energy_mj(start_ms)
        expected[request_id] = expected.get(request_id, 0) + energy_mj
    assert {request_id: bill.total_mj for request_id, bill in bills.items()} == expected
