"""Runs of an engine and its meter made up at random, and what must hold of a ledger that saw one.

Used by the property tests of the ledger: `test_ledger.py` and `test_ledger_conservation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from replicas.energy.learning import CoefficientLearner
from replicas.energy.ledger import Ledger, LedgerLimits, RequestJoules
from replicas.energy.meter import Reading, Source
from replicas.energy.weights import GPU_COEFFICIENTS, DeviceCoefficients
from replicas.energy.window import MOST_MJ
from replicas.request import EngineCosts, StepMember, StepRecord, StepRows

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


EXPERT_COSTS = replace(COSTS, active_params=1_300_000_000, expert_bytes=9_437_184)
TIGHT = LedgerLimits(open_windows=3, open_steps=4, requests=2, payers=2, patience_ms=20.0)
"""So that whatever a ledger bounds overflows in a run of a few steps."""
RUNAWAY_MJ = 10 * MOST_MJ


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
        steps.append(
            StepRecord(step=number, start_ns=t_ms * MS, end_ns=end_ms * MS, rows=StepRows.of(members))
        )
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


def make_any_ledger(random: Random, *, limits: LedgerLimits | None) -> Ledger:
    """Any device, model and engine, and what was learned or not."""
    coefficients = make_coefficients(random)
    learner = CoefficientLearner(coefficients, windows_to_trust=random.choice((1, 50)))
    return Ledger(
        costs=random.choice((COSTS, EXPERT_COSTS)),
        idle_power_w=random.choice((None, IDLE_W)),
        coefficients=coefficients,
        learner=random.choice((None, learner)),
        lookahead=random.choice((0, 0, 1, 3)),
        limits=limits,
    )


def make_coefficients(random: Random) -> DeviceCoefficients:
    """Any device at all, also one whose work costs nothing but time."""
    return DeviceCoefficients(
        joules_per_flop=random.choice((0.0, 10 ** random.uniform(-14, -10))),
        joules_per_byte=random.choice((0.0, 10 ** random.uniform(-12, -8))),
        flops_per_s=10 ** random.uniform(10, 16),
        bytes_per_s=10 ** random.uniform(9, 13),
        static_w=random.uniform(0.1, 500.0),
        step_s=10 ** random.uniform(-6, -1),
        sequence_s=10 ** random.uniform(-8, -3),
    )


def assert_conserved(ledger: Ledger, bills: Sequence[RequestJoules], *, seen_mj: int) -> None:
    totals = ledger.totals()
    assert totals.requests_mj + totals.idle_mj + totals.unattributed_mj == totals.meter_mj
    assert totals.meter_mj + totals.pending_mj == seen_mj
    assert sum(bill.total_mj for bill in bills) == totals.billed_mj
    payers = ledger.payers.values()
    assert sum(payer.prefill_mj for payer in payers) == totals.prefill_mj
    assert sum(payer.prefill_mj + payer.decode_mj for payer in payers) == totals.requests_mj
    assert min(totals.requests_mj, totals.idle_mj, totals.unattributed_mj, totals.pending_mj) >= 0
    assert max(totals.prefill_mj, totals.static_mj, totals.wasted_mj) <= totals.requests_mj
    host = ledger.host_totals()
    assert 0 <= host.requests_mj <= host.meter_mj


def counters_of(ledger: Ledger) -> dict[str, int]:
    """All that is published as a counter: a scrape must not see one fall."""
    totals, host = ledger.totals(), ledger.host_totals()
    names = ("meter_mj", "requests_mj", "idle_mj", "unattributed_mj", "prefill_mj", "static_mj", "wasted_mj")
    counters = {name: getattr(totals, name) for name in names}
    counters |= {"decode_mj": totals.requests_mj - totals.prefill_mj}
    counters |= {"host": host.meter_mj, "host requests": host.requests_mj, "host rest": host.rest_mj}
    for payer, sums in ledger.payers.items():
        counters |= {f"{payer} prefill": sums.prefill_mj, f"{payer} decode": sums.decode_mj}
    return counters


def assert_sane(bill: RequestJoules) -> None:
    assert bill.prefill_mj >= 0
    assert bill.decode_mj >= 0
    assert 0 <= bill.static_mj <= bill.total_mj
    assert 0 <= bill.wasted_mj <= bill.total_mj
    assert bill.confidence_factor >= 1.0
    assert (bill.host_mj or 0) >= 0


def make_chaotic_world(random: Random, *, most_steps: int) -> World:
    """Steps may overlap those before them, as ones launched ahead, take no time, hit experts, be empty."""
    world = make_world(random, num_steps=random.randint(1, most_steps))
    steps = []
    for step in world.steps:
        ahead_ns = random.choice((0, 0, 0, random.randint(0, 60) * MS))
        start_ns = max(0, step.start_ns - ahead_ns)
        steps.append(
            replace(
                step,
                start_ns=start_ns,
                end_ns=start_ns if random.random() < 0.05 else step.end_ns,
                experts_hit=random.choice((0, 1, 256)),
                rows=step.rows if random.random() < 0.95 else StepRows(),
            )
        )
    steps.sort(key=lambda step: step.start_ns)
    return replace(world, steps=tuple(steps))


def chaotic_events(random: Random, world: World) -> list[tuple[int, StepRecord | Reading]]:
    """Steps that come late, or never; a counter that begins anew, runs away, stands still, or is unknown
    for a while; readings out of order, of one instant, of another source; a host that comes and goes.
    """
    events: list[tuple[int, StepRecord | Reading]] = []
    for step in world.steps:
        if random.random() > 0.1:
            late_ms = random.choice((0, 1, 10, 200))
            events.append((step.end_ns + late_ms * MS, step))
    shift_mj, host_mj = 0, 0
    scale = random.choice((0, 1, 1, 1, 1))
    knows_static, knows_host = random.random() < 0.3, random.random() < 0.5
    for t_ms in make_edges(random, world.end_ms + 400):
        if random.random() < 0.05:
            shift_mj += random.choice((-random.randint(0, 20_000), RUNAWAY_MJ))
        host_mj = 0 if random.random() < 0.05 else host_mj + random.choice((0, random.randint(0, 9_000)))
        reading = Reading(
            t_ns=(t_ms - random.choice((0, 0, 0, 90))) * MS,
            energy_mj=100_000_000 + scale * world.energy_mj(t_ms) + shift_mj,
            source=random.choice((Source.COUNTER, Source.COUNTER, Source.POWER_INTEGRATED)),
            static_mj=IDLE_W * t_ms if knows_static and random.random() < 0.9 else None,
            host_mj=host_mj if knows_host and random.random() < 0.9 else None,
            gap=random.random() < 0.1,
        )
        events.append((t_ms * MS, reading))
    return sorted(events, key=lambda event: event[0])


def disturb(random: Random, ledger: Ledger, live: set[int], now_ns: int) -> None:
    """What callers do between two events: end requests at any time and begin them again, lose steps, look."""
    if live and random.random() < 0.03:
        ledger.end_request(live.pop(), now_ns - random.choice((0, 50)) * MS)
    if random.random() < 0.02:
        request_id = random.randrange(4)
        ledger.begin_request(request_id, random.choice(("red", "blue", "green", "")))
        live.add(request_id)
    if random.random() < 0.05:
        ledger.lose_steps(start_ns=now_ns - 30 * MS, end_ns=now_ns)
    if random.random() < 0.2 and (provisional := ledger.provisional(random.randrange(5))):
        assert_sane(provisional)


def run_through_chaos(seed: int, *, most_steps: int = 24) -> None:
    """A run of an engine and its meter in which anything goes wrong that can.

    Asserts after every event that each millijoule is somewhere once and no counter falls, and at the end that
    all bills are out.
    """
    random = Random(seed)
    world = make_chaotic_world(random, most_steps=most_steps)
    is_tight = random.random() < 0.25
    ledger = make_any_ledger(random, limits=TIGHT if is_tight else None)
    bills: list[RequestJoules] = []
    events = chaotic_events(random, world)
    last: Reading | None = None
    seen_mj = 0
    live = set(world.ids)
    for request_id in sorted(live):
        if random.random() < 0.7:
            ledger.begin_request(request_id, random.choice(("red", "blue", "green")))
    counters: dict[str, int] = {}
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
        disturb(random, ledger, live, arrival_ns)
        bills += ledger.take_closed()
        assert_conserved(ledger, bills, seen_mj=seen_mj)
        before, counters = counters, counters_of(ledger)
        assert all(counters[name] >= value for name, value in before.items()), (before, counters)
    assert last is not None
    end_ns = events[-1][0]
    # A ledger that remembers two requests takes the late step of a third for one that begins.
    for request_id in sorted(world.ids | live if is_tight else live):
        ledger.end_request(request_id, end_ns)
    ledger.add_reading(replace(last, t_ns=end_ns + MS, gap=False))
    ledger.advance(end_ns + 60_000 * MS)  # Past the patience of any.
    bills += ledger.take_closed()
    assert_conserved(ledger, bills, seen_mj=seen_mj)
    assert ledger.totals().pending_mj == 0
    for bill in bills:
        assert_sane(bill)
    assert {bill.request_id for bill in bills} | set(ledger.take_unmeasured()) >= world.ids
    assert ledger.totals().billed_mj == ledger.totals().requests_mj
