"""What a supervisor publishes of its ledger: sums by source that conserve the meter, power and cost."""

from __future__ import annotations

import pytest

from replicas.energy.ledger import Ledger
from replicas.energy.meter import Reading, Source
from replicas.request import (
    EngineCosts,
    LoadSnapshot,
    SequenceDelta,
    StepMember,
    StepRecord,
    StepRows,
)
from replicas.step_report import StepReport
from replicas.supervisor.energy_account import EnergyAccount, EnergySums

MS = 1_000_000
COSTS = EngineCosts(
    active_params=1_000_000,
    shared_weight_bytes=2_000_000,
    expert_bytes=0,
    num_layers=2,
    attention_dim=64,
    kv_bytes_per_token=256,
)
LOAD = LoadSnapshot(
    step=1, running=(), waiting=(), waiting_prefill_tokens=(), free_blocks=(), total_blocks=()
)


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def make_account(clock: Clock) -> EnergyAccount:
    return EnergyAccount(Ledger(costs=COSTS, idle_power_w=0.0), clock=clock)


def make_step(*, start_ns: int, end_ns: int, num_tokens: int) -> StepReport:
    member = StepMember(request_id=1, new_tokens=num_tokens, context_tokens=0, is_prefill=False)
    record = StepRecord(step=1, start_ns=start_ns, end_ns=end_ns, rows=StepRows.of([member]))
    delta = SequenceDelta(request_id=1, attempt=1, first_offset=0, token_ids=(7,) * num_tokens)
    return StepReport(step=1, deltas=(delta,), load=LOAD, record=record)


def test_nothing_is_known_before_the_meter_spoke() -> None:
    account = make_account(Clock())
    account.tick()
    assert (account.source, account.power_w, account.joules_per_token) == (None, None, None)
    assert account.sums == {}


def test_power_is_the_slope_of_the_meter() -> None:
    clock = Clock()
    account = make_account(clock)
    for t_ms in (0, 100, 200):
        clock.now_ns = t_ms * MS
        account.add_reading(Reading(t_ns=t_ms * MS, energy_mj=t_ms * 80, source=Source.FAKE))
    assert account.power_w == pytest.approx(80.0)


def test_power_with_and_without_a_step_is_told_apart() -> None:
    clock = Clock()
    account = EnergyAccount(Ledger(costs=COSTS, idle_power_w=80.0), clock=clock)
    account.add_reading(Reading(t_ns=0, energy_mj=0, source=Source.FAKE))
    account.tick()
    clock.now_ns = 1000 * MS
    account.add_step(make_step(start_ns=0, end_ns=500 * MS, num_tokens=50))
    # Half a second at 400 W, half a second at 80 W.
    account.add_reading(Reading(t_ns=1000 * MS, energy_mj=240_000, source=Source.FAKE))
    account.tick()
    assert account.idle_power_w == 80.0
    assert account.active_power_w == pytest.approx(400.0)


def test_a_gap_says_nothing_of_power() -> None:
    account = make_account(Clock())
    account.add_reading(Reading(t_ns=0, energy_mj=0, source=Source.FAKE))
    account.add_reading(Reading(t_ns=100 * MS, energy_mj=10**6, source=Source.FAKE, gap=True))
    assert account.power_w is None


def test_cost_is_request_energy_by_generated_token() -> None:
    clock = Clock()
    account = make_account(clock)
    account.add_reading(Reading(t_ns=0, energy_mj=0, source=Source.FAKE))
    account.tick()
    account.begin(1)
    clock.now_ns = 1000 * MS
    account.add_step(make_step(start_ns=0, end_ns=1000 * MS, num_tokens=50))
    account.add_reading(Reading(t_ns=1000 * MS, energy_mj=100_000, source=Source.FAKE))
    account.tick()
    assert account.joules_per_token == pytest.approx(2.0)


def test_a_meter_that_changes_its_kind_starts_a_series_of_its_own() -> None:
    clock = Clock()
    account = make_account(clock)
    sources = (Source.COUNTER, Source.COUNTER, Source.POWER_INTEGRATED, Source.POWER_INTEGRATED)
    for index, source in enumerate(sources):
        clock.now_ns = index * 100 * MS
        account.add_reading(Reading(t_ns=clock.now_ns, energy_mj=index * 8_000, source=source))
    assert set(account.sums) == {Source.COUNTER, Source.POWER_INTEGRATED}
    total = sum(account.sums.values(), EnergySums())
    assert total == EnergySums(idle_mj=24_000, meter_mj=24_000)
