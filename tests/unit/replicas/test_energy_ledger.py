"""The step ledger on scenes small enough to add up by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from replicas.energy.ledger import Ledger, LedgerLimits, RequestJoules
from replicas.energy.meter import Reading, Source
from replicas.energy.replay import StepPowerMeter
from replicas.energy.weights import CPU_COEFFICIENTS
from replicas.energy.window import MOST_MJ
from replicas.request import EngineCosts, StepMember, StepRecord, StepRows

MS = 1_000_000
COSTS = EngineCosts(
    active_params=1_000_000,
    shared_weight_bytes=4_000_000,
    expert_bytes=0,
    num_layers=4,
    attention_dim=64,
    kv_bytes_per_token=512,
)


def make_ledger(
    *, idle_power_w: float | None = 100.0, lookahead: int = 0, limits: LedgerLimits | None = None
) -> Ledger:
    return Ledger(
        costs=COSTS,
        idle_power_w=idle_power_w,
        coefficients=CPU_COEFFICIENTS,
        lookahead=lookahead,
        limits=limits,
    )


def make_step(
    number: int,
    start_ms: float,
    end_ms: float,
    ids: Sequence[int] = (1,),
    *,
    prefill: bool = False,
    wasted: int = 0,
) -> StepRecord:
    members = tuple(
        StepMember(
            request_id=request_id,
            new_tokens=8 if prefill else 1,
            context_tokens=0 if prefill else 16,
            is_prefill=prefill,
            wasted_tokens=wasted,
        )
        for request_id in ids
    )
    return StepRecord(
        step=number, start_ns=round(start_ms * MS), end_ns=round(end_ms * MS), rows=StepRows.of(members)
    )


def make_reading(
    t_ms: float,
    energy_mj: int,
    *,
    source: Source = Source.COUNTER,
    static_mj: int | None = None,
    gap: bool = False,
) -> Reading:
    return Reading(t_ns=round(t_ms * MS), energy_mj=energy_mj, source=source, static_mj=static_mj, gap=gap)


def total_mj(bills: Sequence[RequestJoules]) -> dict[int, int]:
    return {bill.request_id: bill.total_mj for bill in bills}


def test_a_request_alone_pays_the_window_without_its_idle_time() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 20, 60, prefill=True))
    ledger.add_step(make_step(2, 60, 80))
    ledger.end_request(1, 80 * MS)
    ledger.add_reading(make_reading(100, 28_000))
    ledger.advance(100 * MS)

    # 40 ms of idle at 100 W are 4 J; the rest is work, two thirds of its time prefill.
    assert ledger.take_closed() == [
        RequestJoules(
            request_id=1,
            prefill_mj=16_000,
            decode_mj=8_000,
            static_mj=6_000,
            wasted_mj=0,
            source=Source.COUNTER,
            method="step-ledger/2",
            window_ms=100.0,
            confidence_factor=1.05,
            final=True,
        )
    ]
    totals = ledger.totals()
    assert (totals.meter_mj, totals.requests_mj, totals.idle_mj, totals.unattributed_mj) == (
        28_000,
        24_000,
        4_000,
        0,
    )
    assert (totals.billed_mj, totals.pending_mj, totals.closed_windows) == (24_000, 0, 1)


def test_a_step_across_an_edge_is_split_by_time() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 90, [1]))
    ledger.add_step(make_step(2, 90, 110, [2]))
    ledger.end_request(1, 90 * MS)
    ledger.end_request(2, 110 * MS)
    ledger.add_reading(make_reading(100, 10_000))
    ledger.add_reading(make_reading(200, 20_000))
    ledger.advance(200 * MS)
    # Window one: 9 J and 1 J. Window two: 9 of 10 J idle at 100 W, the rest is the second request's.
    assert total_mj(ledger.take_closed()) == {1: 9_000, 2: 2_000}
    assert ledger.totals().idle_mj == 9_000


def test_a_window_waits_for_its_steps_to_be_in() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_reading(make_reading(100, 10_000))
    assert ledger.totals().pending_mj == 10_000
    ledger.add_step(make_step(1, 0, 50))
    ledger.end_request(1, 50 * MS)
    ledger.advance(99 * MS)
    assert ledger.take_closed() == []
    ledger.advance(100 * MS)
    assert total_mj(ledger.take_closed()) == {1: 5_000}


def test_while_a_request_is_live_a_window_waits_for_the_step_that_may_be_running() -> None:
    ledger = make_ledger()
    ledger.begin_request(1)
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 80))
    ledger.add_reading(make_reading(100, 10_000))
    ledger.advance(150 * MS)
    assert ledger.totals().closed_windows == 0
    ledger.add_step(make_step(2, 80, 160))
    ledger.advance(161 * MS)
    assert ledger.totals().requests_mj == 10_000


def test_a_hung_step_holds_windows_no_longer_than_the_patience() -> None:
    ledger = make_ledger(limits=LedgerLimits(patience_ms=1000.0))
    ledger.begin_request(1)
    ledger.add_reading(make_reading(0, 0))
    ledger.add_reading(make_reading(100, 10_000))
    ledger.advance(1099 * MS)
    assert ledger.totals().closed_windows == 0
    ledger.advance(1100 * MS)
    assert ledger.totals().closed_windows == 1


def test_a_request_that_never_ran_is_billed_a_measured_zero() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.begin_request(7)
    ledger.end_request(7, 50 * MS)
    ledger.add_reading(make_reading(100, 10_000))
    ledger.advance(100 * MS)
    (bill,) = ledger.take_closed()
    assert (bill.request_id, bill.total_mj, bill.final, bill.window_ms) == (7, 0, True, 0.0)


def test_the_energy_of_steps_outside_the_meter_is_unknown_not_zero() -> None:
    ledger = make_ledger()
    ledger.add_step(make_step(1, 0, 50, [1]))
    ledger.end_request(1, 50 * MS)
    ledger.add_reading(make_reading(100, 0))
    ledger.add_reading(make_reading(200, 10_000))
    ledger.advance(200 * MS)
    assert ledger.take_closed() == []
    assert ledger.take_unmeasured() == [1]
    assert ledger.totals().unmeasured == 1


def test_a_gap_goes_to_unattributed_and_widens_the_confidence() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 100))
    ledger.add_step(make_step(2, 100, 200))
    ledger.end_request(1, 200 * MS)
    ledger.add_reading(make_reading(100, 30_000))
    ledger.add_reading(make_reading(200, 70_000, gap=True))
    ledger.advance(200 * MS)
    (bill,) = ledger.take_closed()
    assert bill.total_mj == 30_000
    assert bill.confidence_factor == pytest.approx(2.1)
    assert ledger.totals().unattributed_mj == 40_000
    assert ledger.totals().low_confidence == 1


def test_a_counter_that_falls_is_a_gap_and_never_negative() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 5_000))
    ledger.add_reading(make_reading(100, 1_000))
    ledger.add_reading(make_reading(200, 11_000))
    ledger.advance(200 * MS)
    totals = ledger.totals()
    assert (totals.meter_mj, totals.idle_mj, totals.unattributed_mj) == (10_000, 10_000, 0)


def test_an_older_reading_is_dropped() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(100, 0))
    ledger.add_reading(make_reading(90, 4_000))
    ledger.add_reading(make_reading(200, 10_000))
    ledger.advance(200 * MS)
    assert ledger.totals().meter_mj == 10_000
    assert ledger.totals().dropped_readings == 1


def test_pauses_between_steps_of_a_live_request_are_work() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 40))
    ledger.add_step(make_step(2, 55, 100))
    ledger.end_request(1, 100 * MS)
    ledger.add_reading(make_reading(100, 30_000))
    ledger.advance(100 * MS)
    assert total_mj(ledger.take_closed()) == {1: 30_000}


def test_a_pause_with_missing_steps_is_a_hole_and_its_window_unattributed() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 20, [1]))
    ledger.add_step(make_step(4, 80, 100, [1]))
    ledger.add_step(make_step(5, 100, 200, [1]))
    ledger.end_request(1, 200 * MS)
    ledger.add_reading(make_reading(100, 30_000))
    ledger.add_reading(make_reading(200, 50_000))
    ledger.advance(200 * MS)
    assert total_mj(ledger.take_closed()) == {1: 20_000}
    assert ledger.totals().unattributed_mj == 30_000


def test_steps_said_to_be_lost_make_their_window_unattributed() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.lose_steps(start_ns=0, end_ns=50 * MS)
    ledger.add_reading(make_reading(100, 30_000))
    ledger.advance(100 * MS)
    assert ledger.totals().idle_mj == 5_000
    assert ledger.totals().unattributed_mj == 25_000


def test_warm_power_is_measured_in_idle_windows_and_falls_faster_than_it_rises() -> None:
    ledger = make_ledger(idle_power_w=None)
    assert ledger.totals().warm_power_w is None
    ledger.add_reading(make_reading(0, 0))
    for second, energy_mj in enumerate((10_000, 18_000, 58_000), start=1):
        ledger.add_reading(make_reading(100 * second, energy_mj))
        ledger.advance(100 * second * MS)
    # 100 W, then half way down to 80 W, then a twentieth of the way up to 400 W.
    assert ledger.totals().warm_power_w == pytest.approx(90.0 + 0.05 * 310.0)


def test_the_static_part_told_by_the_meter_is_the_idle_power_of_its_window() -> None:
    ledger = make_ledger(idle_power_w=None)
    ledger.add_reading(make_reading(0, 0, source=Source.TDP, static_mj=0))
    ledger.add_step(make_step(1, 0, 75))
    ledger.end_request(1, 75 * MS)
    ledger.add_reading(make_reading(100, 5_000, source=Source.TDP, static_mj=1_000))
    ledger.advance(100 * MS)
    (bill,) = ledger.take_closed()
    assert (bill.total_mj, bill.static_mj) == (4_750, 750)
    assert ledger.totals().idle_mj == 250


def test_the_worse_of_two_sources_is_on_the_bill() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 100))
    ledger.add_step(make_step(2, 100, 200))
    ledger.end_request(1, 200 * MS)
    ledger.add_reading(make_reading(100, 30_000, source=Source.POWER_INTEGRATED))
    ledger.add_reading(make_reading(200, 60_000, source=Source.COUNTER))
    ledger.advance(200 * MS)
    (bill,) = ledger.take_closed()
    assert (bill.source, bill.confidence_factor) == (Source.POWER_INTEGRATED, 1.10)


def test_recomputed_tokens_are_counted_as_wasted() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 100, prefill=True, wasted=2))
    ledger.end_request(1, 100 * MS)
    ledger.add_reading(make_reading(100, 20_000))
    ledger.advance(100 * MS)
    (bill,) = ledger.take_closed()
    assert (bill.prefill_mj, bill.wasted_mj) == (20_000, 5_000)


def test_provisional_adds_an_estimate_for_open_windows() -> None:
    ledger = make_ledger()
    assert ledger.provisional(1) is None
    ledger.begin_request(1)
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 50, prefill=True))
    assert ledger.provisional(1) is None
    ledger.add_step(make_step(2, 50, 100))
    ledger.add_reading(make_reading(100, 20_000))
    ledger.advance(100 * MS)
    ledger.add_step(make_step(3, 100, 150))
    bill = ledger.provisional(1)
    assert bill is not None
    assert (bill.prefill_mj, bill.decode_mj, bill.final) == (10_000, 20_000, False)


def test_the_last_windows_close_without_waiting_for_other_requests_to_end() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 40, [1, 2]))
    ledger.end_request(1, 40 * MS)
    ledger.add_step(make_step(2, 40, 60, [2]))
    ledger.add_reading(make_reading(50, 10_000))
    ledger.advance(60 * MS)
    assert total_mj(ledger.take_closed()) == {1: 4_000}


def test_too_many_open_windows_close_as_unattributed() -> None:
    ledger = make_ledger(limits=LedgerLimits(open_windows=2))
    for index in range(4):
        ledger.add_reading(make_reading(100 * index, 10_000 * index))
    assert ledger.totals().unattributed_mj == 10_000
    assert ledger.totals().pending_mj == 20_000


def test_what_open_accounts_cannot_hold_is_unattributed_and_nothing_is_lost() -> None:
    """A request that never ends takes a gigajoule a window, up to some megawatt hours in all."""
    ledger = make_ledger(idle_power_w=0.0)
    ledger.add_reading(make_reading(0, 0))
    for number in range(1, 7):
        ledger.add_step(make_step(number, 100 * (number - 1), 100 * number))
        ledger.add_reading(make_reading(100 * number, number * MOST_MJ))
        ledger.advance(100 * number * MS)
    totals = ledger.totals()
    assert (totals.requests_mj, totals.unattributed_mj) == (4 * MOST_MJ, 2 * MOST_MJ)
    ledger.end_request(1, 600 * MS)
    assert total_mj(ledger.take_closed()) == {1: 4 * MOST_MJ}
    ledger.add_step(make_step(7, 600, 700, [2]))
    ledger.end_request(2, 700 * MS)
    ledger.add_reading(make_reading(700, 6 * MOST_MJ + 5_000))
    ledger.advance(700 * MS)
    assert total_mj(ledger.take_closed()) == {2: 5_000}


def test_too_many_open_steps_are_dropped_and_their_window_unattributed() -> None:
    ledger = make_ledger(limits=LedgerLimits(open_steps=2))
    ledger.add_reading(make_reading(0, 0))
    for number in range(3):
        ledger.add_step(make_step(number, 10 * number, 10 * number + 10))
    ledger.end_request(1, 30 * MS)
    ledger.add_reading(make_reading(100, 20_000))
    ledger.advance(100 * MS)
    assert ledger.totals().dropped_steps == 1
    assert ledger.totals().unattributed_mj == 13_000


def test_too_many_requests_close_the_oldest() -> None:
    ledger = make_ledger(limits=LedgerLimits(requests=2))
    ledger.add_reading(make_reading(0, 0))
    for request_id in range(3):
        ledger.begin_request(request_id)
    assert total_mj(ledger.take_closed()) == {0: 0}


def test_a_request_that_fell_out_pays_for_its_steps_and_nobody_in_its_place() -> None:
    ledger = make_ledger(limits=LedgerLimits(requests=2))
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 100, [1]))
    for request_id in (2, 3, 4):
        ledger.begin_request(request_id)
    assert total_mj(ledger.take_closed()) == {1: 0, 2: 0}
    ledger.add_reading(make_reading(100, 20_000))
    ledger.advance(100 * MS)
    assert total_mj(ledger.take_closed()) == {1: 20_000}, "nobody may come and end it any more"
    for request_id in (1, 3, 4):
        ledger.end_request(request_id, 100 * MS)
    assert total_mj(ledger.take_closed()) == {1: 0, 3: 0, 4: 0}


def test_a_late_step_is_counted_and_lowers_the_coverage_of_its_request() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_reading(make_reading(100, 10_000))
    ledger.advance(100 * MS)
    ledger.add_step(make_step(1, 50, 150))
    ledger.end_request(1, 150 * MS)
    ledger.add_reading(make_reading(200, 30_000))
    ledger.advance(200 * MS)
    (bill,) = ledger.take_closed()
    assert (bill.total_mj, ledger.totals().late_steps) == (15_000, 1)
    assert bill.confidence_factor == pytest.approx(2.1)


def test_a_step_launched_ahead_of_the_end_is_on_the_same_bill() -> None:
    ledger = make_ledger(lookahead=1)
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 50))
    ledger.end_request(1, 50 * MS)
    ledger.add_reading(make_reading(60, 6_000))
    ledger.advance(60 * MS)
    assert ledger.take_closed() == []
    ledger.add_step(make_step(2, 50, 100, wasted=1))
    ledger.add_reading(make_reading(110, 11_000))
    ledger.advance(150 * MS)
    (bill,) = ledger.take_closed()
    assert (bill.total_mj, bill.wasted_mj) == (10_000, 5_000)


def test_a_step_of_a_request_already_final_makes_a_second_bill_that_closes_by_itself() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 50))
    ledger.end_request(1, 50 * MS)
    ledger.add_reading(make_reading(50, 5_000))
    ledger.advance(50 * MS)
    ledger.add_step(make_step(2, 50, 100))
    ledger.add_reading(make_reading(100, 12_000))
    ledger.advance(100 * MS)
    assert [bill.total_mj for bill in ledger.take_closed()] == [5_000, 7_000]


def test_a_run_of_the_null_engine_is_billed_to_the_millijoule_and_final_in_time() -> None:
    """As the supervisor drives it: 5 ms steps at 400 W, 80 W idle, a frame 1 ms late, a poll each 30 ms."""
    now_ms = 0
    meter = StepPowerMeter(power_w=400.0, idle_power_w=80.0, clock=lambda: now_ms * MS, settle_s=0.02)
    ledger = make_ledger(idle_power_w=None)
    final_ms = None
    for now_ms in range(1000):
        number = (now_ms - 201) // 5 + 1
        if now_ms == 200:
            ledger.begin_request(1)
        if (now_ms - 201) % 5 == 0 and 1 <= number <= 50:
            step = make_step(number, now_ms - 6, now_ms - 1, [1], prefill=number == 1)
            meter.note_step(step.start_ns, step.end_ns)
            ledger.add_step(step)
            if number == 50:
                ledger.end_request(1, now_ms * MS)
        if now_ms % 30 == 0:
            ledger.add_reading(meter.read())
        ledger.advance(now_ms * MS)
        for bill in ledger.take_closed():
            assert (bill.prefill_mj, bill.decode_mj, bill.static_mj) == (5 * 400, 49 * 5 * 400, 250 * 80)
            final_ms = now_ms
    assert final_ms is not None
    assert final_ms - 445 <= 60
    assert ledger.totals().unattributed_mj == 0


def test_a_step_of_a_billed_request_comes_back_into_a_full_ledger() -> None:
    """As steps launched ahead do while a meter hangs and bills wait: it pushes out another, not itself."""
    ledger = make_ledger(limits=LedgerLimits(requests=1))
    ledger.add_reading(make_reading(0, 0))
    ledger.begin_request(1)
    ledger.end_request(1, 0)
    ledger.begin_request(2)
    ledger.add_step(make_step(1, 0, 10, (1,)))
    ledger.add_step(make_step(2, 10, 20, (1,)))
    ledger.add_step(make_step(3, 20, 30, (1, 2)))
    ledger.end_request(2, 30 * MS)
    ledger.add_reading(make_reading(30, 3000))
    ledger.advance(31 * MS)
    bills = ledger.take_closed()
    assert sum(bill.total_mj for bill in bills) == ledger.totals().requests_mj == 3000
    assert {bill.request_id for bill in bills} == {1, 2}


def test_a_step_that_ended_within_another_one_owes_nothing_of_what_is_open() -> None:
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_step(make_step(1, 0, 90, (1,)))
    ledger.add_step(make_step(2, 5, 10, (2,)))
    ledger.add_reading(make_reading(50, 5000))
    ledger.advance(91 * MS)
    held, bill = ledger.totals().requests_mj, ledger.provisional(2)
    assert bill is not None
    assert 0 < bill.total_mj < held == 5000
    billed = bill.total_mj
    ledger.end_request(2, 10 * MS)
    assert total_mj(ledger.take_closed()) == {2: billed}


def test_the_gap_of_a_reading_that_came_too_late_is_not_lost() -> None:
    """As of another host's agent that was dialled again, and whose clock is now thought to be behind."""
    ledger = make_ledger()
    ledger.add_reading(make_reading(0, 0))
    ledger.add_reading(make_reading(50, 5000))
    ledger.add_step(make_step(1, 0, 100, (1,)))
    ledger.add_reading(make_reading(49, 5000, gap=True))
    ledger.add_reading(make_reading(100, 6000))
    ledger.end_request(1, 100 * MS)
    ledger.advance(100 * MS)
    assert (ledger.totals().requests_mj, ledger.totals().unattributed_mj) == (5000, 1000)
    (bill,) = ledger.take_closed()
    assert bill.confidence_factor > 2.0, "half of its step is not on the bill"
