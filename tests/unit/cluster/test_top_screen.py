"""`wattline top` on eighty columns: every number, honest words for unknown energy, and a sum that adds up."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from cluster.commands.event_line import show_duration
from cluster.commands.top_screen import (
    HISTORY_POINTS,
    TopScreen,
    describe_ledger,
    describe_source,
    draw_line,
    share_cells,
)
from cluster.replies import (
    ExpertState,
    FleetEvent,
    HostState,
    Latency,
    LedgerState,
    ModelState,
    PowerState,
    RequestState,
    RouterState,
)

LEDGER = LedgerState(
    source="tdp",
    confidence_factor=2.0,
    meter_mj=5100,
    prefill_mj=1200,
    decode_mj=3400,
    idle_mj=500,
    unattributed_mj=0,
    static_mj=900,
    wasted_mj=0,
)
MODEL = ModelState(
    name="llama-demo",
    min_replicas=1,
    max_replicas=1,
    active_requests=3,
    waiting_requests=2,
    output_tokens_per_s=1234.5,
    joules_per_output_token=0.266,
    energy_source="tdp",
    replicas=(),
    joules_per_total_token=0.0772,
    ttft_ms=Latency(p50=31.2, p95=1400.0),
    tpot_ms=Latency(p50=12.0, p95=15.0),
    slo_met=3,
    slo_missed=1,
    ledger=(LEDGER,),
    power=PowerState(meter_w=100, prefill_w=20, decode_w=50, idle_w=30, unattributed_w=0, static_w=40),
)
REQUEST = RequestState(
    request_id="a4aee49fa81d09a050986b5c",
    trace_id="0" * 32,
    model="llama-demo",
    age_s=75.0,
    prompt_tokens=48,
    output_tokens=60,
    ttft_ms=22.0,
    total_ms=421.0,
    energy_mj=6920,
    is_final=False,
    outcome="stop",
)
STATE = RouterState(
    router_id="router-1", version="0.1.0", uptime_s=10, models=(MODEL,), last_requests=(REQUEST,)
)


def draw(state: RouterState, *, lost: str = "") -> str:
    out = io.StringIO()
    screen = TopScreen()
    screen.add(state)
    if lost:
        screen.note_lost(lost)
    Console(file=out, width=80).print(screen.render())
    return out.getvalue()


def test_every_number_is_on_the_screen() -> None:
    text = draw(STATE)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for shown in (
        "1,234.5",
        "31.2ms/1.4s",
        "12ms/15ms",
        "75%",
        "0.266",
        "0.0772",
        "estimated (tdp, ×2)",
        "1.200 + 3.400 + 0.500 + 0.000 = 5.100 J",
        "a4aee49f",
        "6.92~",
        "0.115",
    ):
        assert shown in text


def test_experts_and_what_happened_to_replicas_are_lines_of_eighty_columns() -> None:
    experts = ExpertState(
        imbalance=1.062,
        imbalance_without_copies=1.344,
        num_copies=48,
        num_ranks=2,
        hottest_load=5.92,
        hottest_layer=18,
        hottest_expert=31,
    )
    event = FleetEvent(model="m", replica_id="m#4f0a1c2e", kind="frozen", reason="x" * 200, age_s=75.0)
    text = draw(replace(STATE, models=(replace(MODEL, experts=experts),), events=(event,) * 9))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "5.92× hottest (layer 18 expert 31)  ranks 1.06×, 1.34× without copies" in text
    assert text.count("1m ago  m#4f0a1c2e  frozen: xxx") == 3
    alone = replace(experts, imbalance=None, imbalance_without_copies=None)
    assert "1.06" not in draw(replace(STATE, models=(replace(MODEL, experts=alone),)))


def test_a_metered_host_has_a_line_whose_parts_are_its_meter_and_others_have_none() -> None:
    host = HostState(meter_mj=500_100, requests_mj=400_000, power_w=1234.5)
    text = draw(replace(STATE, models=(replace(MODEL, host=host),)))
    assert "host 1,234 W beside it  400.000 for requests + 100.100 rest = 500.100 J" in text
    assert "1.200 + 3.400 + 0.500 + 0.000 = 5.100 J" in text
    assert "host" not in draw(STATE)
    assert "host - W" in draw(replace(STATE, models=(replace(MODEL, host=replace(host, power_w=None)),)))


def test_a_small_terminal_shows_the_numbers_of_two_models_and_a_request() -> None:
    event = FleetEvent(model="m", replica_id="r", kind="attached", reason="tp 2", age_s=1.0)
    models = (MODEL, replace(MODEL, name="other", host=HostState(meter_mj=2, requests_mj=1, power_w=9.0)))
    state = replace(STATE, models=models, last_requests=(REQUEST,) * 50, events=(event,) * 9)
    for height in (24, 40):
        out = io.StringIO()
        screen = TopScreen()
        screen.add(state)
        Console(file=out, width=80).print(screen.render(height=height))
        text = out.getvalue()
        assert len(text.splitlines()) == height
        assert text.count("1,234.5") == 2
        assert ("attached: tp 2" in text) is (height == 40)


def test_keys_are_named_where_there_are_any() -> None:
    out = io.StringIO()
    screen = TopScreen()
    screen.add(STATE)
    Console(file=out, width=80).print(screen.render(height=24))
    assert "q quits" in out.getvalue()
    assert "q quits" not in draw(STATE)


def test_unknown_energy_is_said_and_an_empty_router_says_what_to_do() -> None:
    text = draw(replace(STATE, models=(replace(MODEL, ledger=(), power=None),), last_requests=()))
    assert "energy unknown" in text
    assert "wattline chat" in text


def test_a_lost_router_is_said_and_its_numbers_stay() -> None:
    text = draw(STATE, lost="no router")
    assert "reconnecting: no router" in text
    assert "1,234.5" in text


def test_a_replica_that_just_went_is_told_even_on_a_small_terminal() -> None:
    event = FleetEvent(model="m", replica_id="m#1", kind="lost", reason="rank 0 was killed", age_s=59.0)
    state = replace(STATE, models=(MODEL,) * 2, last_requests=(REQUEST,) * 50, events=(event,) * 9)
    for age_s, times in ((59.0, 1), (61.0, 0)):
        out = io.StringIO()
        screen = TopScreen()
        screen.add(replace(state, events=(replace(event, age_s=age_s),) * 9))
        Console(file=out, width=80).print(screen.render(height=24))
        assert out.getvalue().count("lost: rank 0 was killed") == times
        assert len(out.getvalue().splitlines()) == 24


def test_a_model_says_how_many_of_its_replicas_are_ready() -> None:
    assert "llama-demo  0 of 1 ready  estimated" in draw(STATE)


def make_ledger(prefill_mj: int, decode_mj: int, idle_mj: int, unattributed_mj: int) -> LedgerState:
    return replace(
        LEDGER,
        prefill_mj=prefill_mj,
        decode_mj=decode_mj,
        idle_mj=idle_mj,
        unattributed_mj=unattributed_mj,
        meter_mj=prefill_mj + decode_mj + idle_mj + unattributed_mj,
    )


def test_a_big_sum_fits_the_line_and_what_is_written_adds_up() -> None:
    line = describe_ledger(make_ledger(1_234_567_890_123, 4_444_444_444_444, 999_999_999_999, 1)).plain
    assert line == "ledger 1,234.568 + 4,444.444 + 1,000.000 + 0.000 = 6,679.012 MJ"
    assert len(describe_ledger(make_ledger(*(24 * 10**13,) * 4)).plain) <= 80


def test_a_wide_terminal_shows_a_longer_past() -> None:
    screen = TopScreen()
    for _ in range(HISTORY_POINTS):
        screen.add(STATE)
    out = io.StringIO()
    Console(file=out, width=200).print(screen.render(width=200))
    assert f"tok/s {'█' * HISTORY_POINTS} max 1,234  W {'█' * HISTORY_POINTS} max 100" in out.getvalue()


def test_a_sum_that_does_not_add_up_is_not_written_as_one() -> None:
    assert "≠" in describe_ledger(replace(LEDGER, meter_mj=5101)).plain


def test_a_source_is_measured_estimated_or_simulated() -> None:
    assert describe_source("counter", 1.05) == "measured (counter, ×1.05)"
    assert describe_source("fake", 1.0) == "simulated (fake)"


def test_cells_are_shared_in_proportion_and_add_up() -> None:
    assert share_cells([20, 50, 30, 0], 10) == [2, 5, 3, 0]
    assert sum(share_cells([1, 1, 1], 10)) == 10
    assert share_cells([0, 0], 10) == [0, 0]


def test_lines_are_bounded_and_relative_to_their_highest() -> None:
    assert draw_line([0, 5, 10], width=3) == "▁▅█"
    assert draw_line([0, None, 0], width=3) == "▁ ▁"
    screen = TopScreen()
    for _ in range(HISTORY_POINTS * 2):
        screen.add(STATE)
    assert len(draw_line(screen._lines["llama-demo"].power_w, width=HISTORY_POINTS)) == HISTORY_POINTS


def test_durations_are_short() -> None:
    assert [show_duration(seconds) for seconds in (42, 420, 10_800)] == ["42s", "7m", "3h"]
