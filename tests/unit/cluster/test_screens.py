"""What people see: tables that fit eighty columns, one line per change, honest words for unknown energy."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

from rich.console import Console

from cluster.commands.loading_screen import LoadingScreen
from cluster.commands.status_screen import describe_cost, render_answers, render_models
from cluster.replies import (
    Energy,
    Final,
    FleetEvent,
    ModelState,
    RankState,
    ReplicaState,
    RouterState,
    Timing,
    Usage,
)


def make_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=80), out


def make_final(*, total_j: float | None = 6.92) -> Final:
    return Final(
        request_id="a4aee49fa81d09a050986b5c",
        trace_id="12d23a057846029c4ff64163a7876aa5",
        usage=Usage(prompt_tokens=48, cached_tokens=0, completion_tokens=60, wasted_tokens=0),
        timing=Timing(queue_ms=1, prefill_ms=20, decode_ms=400, ttft_ms=22, total_ms=421),
        energy=Energy(
            total_j=total_j,
            prefill_j=None,
            decode_j=None,
            static_j=None,
            joules_per_output_token=None if total_j is None else total_j / 60,
            joules_per_total_token=None if total_j is None else total_j / 108,
            source="model_calibrated",
            method="step-ledger/1",
            window_ms=30,
            confidence_factor=2.0,
            is_final=False,
        ),
    )


def make_replica() -> ReplicaState:
    return ReplicaState(
        replica_id="granite-moe-demo#5l3yhbmy",
        state="draining",
        epoch=1,
        architecture="GraniteMoeForCausalLM",
        tensor_parallel=2,
        expert_parallel=2,
        device="cpu",
        dtype="float32",
        kernels="avx512-bfloat16",
        quantization="none",
        energy_source="tdp",
        host="h",
        supervisor_pid=1,
        metrics_address="127.0.0.1:1",
        ranks=(RankState(rank=0, pid=123456, device="cpu"), RankState(rank=1, pid=123457, device="cpu")),
        requests_in_flight=64,
        attached_s=1,
        running=64,
        waiting=12,
        free_blocks=3,
        total_blocks=12,
        step_ms=123.4,
        decode_tokens_per_s=1000,
        power_w=1400,
    )


def make_state(*replicas: ReplicaState) -> RouterState:
    model = ModelState(
        name="granite-moe-demo",
        min_replicas=1,
        max_replicas=1,
        active_requests=64,
        waiting_requests=1024,
        output_tokens_per_s=12345.6,
        joules_per_output_token=0.1234,
        energy_source="tdp",
        replicas=replicas,
    )
    return RouterState(router_id="router-1", version="0.1.0", uptime_s=1, models=(model,))


def test_status_fits_eighty_columns_and_keeps_every_number() -> None:
    console, out = make_console()
    console.print(render_models(make_state(make_replica())))
    text = out.getvalue()
    assert "…" not in text
    for shown in ("granite-moe-demo#5l3yhbmy", "123456 123457", "12,345.6", "0.123", "75%", "1024", "0/1"):
        assert shown in text


def test_a_model_without_replicas_is_still_listed() -> None:
    console, out = make_console()
    console.print(render_models(make_state()))
    assert "granite-moe-demo" in out.getvalue()
    assert "0/1" in out.getvalue()


def test_a_model_short_of_replicas_is_followed_by_what_happened_to_it() -> None:
    lost = FleetEvent(
        model="granite-moe-demo", replica_id="granite#1", kind="lost", reason="rank 0 was killed", age_s=12.0
    )
    state = replace(make_state(), events=(replace(lost, model="other"), lost))
    for now, count in ((state, 1), (replace(state, models=()), 0)):
        console, out = make_console()
        console.print(render_models(now))
        assert out.getvalue().count("ago  ") == count
        assert out.getvalue().count(" 12s ago  granite#1  lost: rank 0 was killed") == count


def test_energy_table_fits_eighty_columns() -> None:
    console, out = make_console()
    console.print(render_answers([("granite-moe-demo", make_final())]))
    assert "…" not in out.getvalue()
    assert "6.92" in out.getvalue()


def test_cost_says_whether_it_is_final_and_what_measured_it() -> None:
    assert describe_cost(make_final()) == (
        "60 tokens in 0.42 s, 6.92 J (0.115 J/token, model_calibrated, provisional)"
    )


def test_a_failover_is_said() -> None:
    assert describe_cost(replace(make_final(total_j=None), resumed_at=(7, 21))) == (
        "60 tokens in 0.42 s (moved to another replica at 7, 21), energy unknown"
    )


def test_unknown_energy_is_said_and_not_zero() -> None:
    assert describe_cost(make_final(total_j=None)) == "60 tokens in 0.42 s, energy unknown"
    console, out = make_console()
    console.print(render_answers([("m", make_final(total_j=None))]))
    assert " - " in out.getvalue()


@dataclass(frozen=True)
class Step:
    model: str
    stage: str
    fraction: float | None = None


def test_without_a_terminal_each_change_is_one_line() -> None:
    console, out = make_console()
    with LoadingScreen(console, ["a"]) as screen:
        for stage in ("starting ranks", "starting ranks", "loading weights", "ready"):
            screen.show([Step("a", stage)])
    assert out.getvalue().splitlines() == ["a: starting ranks", "a: loading weights", "a: ready"]


def test_brackets_in_a_reason_are_shown_as_they_are() -> None:
    for is_terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, width=80, force_terminal=is_terminal)
        with LoadingScreen(console, ["a"]) as screen:
            screen.show([Step("a", "trying again: no [/x]")])
        assert "trying again: no [/x]" in out.getvalue()


def test_unknown_power_is_a_dash() -> None:
    console, out = make_console()
    console.print(render_models(make_state(replace(make_replica(), power_w=None))))
    row = next(line for line in out.getvalue().splitlines() if "5l3yhbmy" in line)
    assert row.split()[-1] == "-"


def test_on_a_terminal_a_bar_moves() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    with LoadingScreen(console, ["a"]) as screen:
        screen.show([replace(Step("a", "loading weights"), fraction=0.5)])
    assert "loading weights" in out.getvalue()
