"""What a replica cannot truly say is taken out before the router uses it; the rest of the message counts."""

from __future__ import annotations

import math

import pytest

from cluster.link.plausibility import (
    MAX_LIFE_MJ,
    MAX_REQUEST_MJ,
    MAX_REQUESTS,
    MAX_SEQUENCE_US,
    MAX_STEP,
    load_problem,
    strike_untrue,
)
from protos import wattline_link_pb2 as link

TRUE_LEDGER = link.LedgerTotals(
    source="counter",
    meter_mj=MAX_LIFE_MJ,
    idle_mj=MAX_LIFE_MJ,
    confidence_factor=1.05,
    tenants=[link.TenantEnergy(tenant="anna", prefill_mj=1)],
)
TRUE_BILL = link.RequestEnergy(request_id=1, source="tdp", prefill_mj=MAX_REQUEST_MJ, confidence_factor=2.0)


TRUE_TRAIL: dict[str, int | link.TokenGap] = {
    "first_step": 5,
    "first_token_step": 6,
    "last_step": 9,
    "prefill_steps": 2,
    "decode_steps": 3,
    "longest_gap": link.TokenGap(duration_us=4, end_us=7, step=8),
}


def timed(delta: link.SequenceTiming) -> link.FromReplica:
    deltas = [link.SequenceDelta(request_id=1), link.SequenceDelta(request_id=2, timing=delta)]
    return link.FromReplica(step=link.StepOutput(step=7, deltas=deltas))


def make_trail(**changes: object) -> link.StepTrail:
    return link.StepTrail(**TRUE_TRAIL | changes)  # type: ignore[arg-type]


def step(**load: object) -> link.FromReplica:
    output = link.StepOutput(step=7, load=link.LoadSnapshot(**load))  # type: ignore[arg-type]
    return link.FromReplica(step=output)


def test_what_may_be_true_stays() -> None:
    for message in (
        step(running=[MAX_REQUESTS], waiting=[3, 4], step_ms=12.5),
        link.FromReplica(ledger=[TRUE_LEDGER]),
        link.FromReplica(energy=link.EnergyReport(requests=[TRUE_BILL, link.RequestEnergy(request_id=2)])),
        timed(link.SequenceTiming(decode_us=7, trail=make_trail())),
        timed(link.SequenceTiming(trail=link.StepTrail(first_step=1, last_step=3, prefill_steps=2))),
        timed(link.SequenceTiming(queue_us=MAX_SEQUENCE_US)),
        link.FromReplica(hello=link.Hello()),
        link.FromReplica(),
    ):
        before = link.FromReplica.FromString(message.SerializeToString())
        assert strike_untrue(message) == []
        assert message == before


@pytest.mark.parametrize(
    ("load", "named"),
    [
        ({"running": [MAX_REQUESTS, 1]}, "load.running"),
        ({"waiting": [2**32 - 1] * 3}, "load.waiting"),
        ({"waiting_prefill_tokens": [2**63]}, "load.waiting_prefill_tokens"),
        ({"step_ms": math.nan}, "load.step_ms"),
        ({"prefill_tokens_per_s": math.inf}, "load.prefill_tokens_per_s"),
        ({"decode_tokens_per_s": -1.0}, "load.decode_tokens_per_s"),
        ({"joules_per_token": 1e300}, "load.joules_per_token"),
        ({"power_w": math.nan}, "load.power_w"),
        ({"idle_power_w": -math.inf}, "load.idle_power_w"),
        ({"active_power_w": math.nan}, "load.active_power_w"),
    ],
)
def test_an_absurd_load_is_struck_and_the_step_stays(load: dict[str, object], named: str) -> None:
    message = step(**load)
    assert load_problem(message.step.load).startswith(named)
    heartbeat = link.FromReplica(heartbeat=link.Heartbeat(load=message.step.load))
    (problem,) = strike_untrue(message)
    assert problem.startswith(named)
    assert message == link.FromReplica(step=link.StepOutput(step=7))
    assert strike_untrue(heartbeat) == [problem]
    assert not heartbeat.heartbeat.HasField("load")


@pytest.mark.parametrize(
    "entry",
    [
        link.LedgerTotals(source="counter", meter_mj=2**64 - 1),
        link.LedgerTotals(source="counter", host_requests_mj=MAX_LIFE_MJ + 1),
        link.LedgerTotals(source="counter", tenants=[link.TenantEnergy(decode_mj=2**63)]),
        link.LedgerTotals(source="counter", tenants=[link.TenantEnergy()] * 257),
        link.LedgerTotals(source="counter", confidence_factor=math.nan),
        link.LedgerTotals(source="perpetual motion"),
    ],
)
def test_a_ledger_with_one_absurd_figure_is_not_booked_at_all(entry: link.LedgerTotals) -> None:
    message = step(running=[1])
    message.ledger.extend([TRUE_LEDGER, entry])
    (problem,) = strike_untrue(message)
    assert problem.startswith("ledger")
    assert message == step(running=[1])


def test_an_absurd_bill_is_struck_and_the_others_stay() -> None:
    absurd = [
        link.RequestEnergy(request_id=5, source="tdp", decode_mj=MAX_REQUEST_MJ + 1),
        link.RequestEnergy(request_id=6, source="tdp", window_ms=math.inf),
        link.RequestEnergy(request_id=7, source="?"),
    ]
    message = link.FromReplica(energy=link.EnergyReport(requests=[absurd[0], TRUE_BILL, *absurd[1:]]))
    assert len(strike_untrue(message)) == len(absurd)
    assert list(message.energy.requests) == [TRUE_BILL]


@pytest.mark.parametrize("field", ["queue_us", "prefill_us", "decode_us"])
def test_times_that_no_span_could_have_are_struck(field: str) -> None:
    message = timed(link.SequenceTiming(cached_tokens=3, **{field: MAX_SEQUENCE_US + 1}))  # type: ignore[arg-type]
    (problem,) = strike_untrue(message)
    assert problem.startswith("timing")
    assert not message.step.deltas[1].HasField("timing")


@pytest.mark.parametrize(
    "changes",
    [
        {"first_step": 0},
        {"first_step": 7},
        {"first_token_step": 10},
        {"last_step": MAX_STEP + 1},
        {"prefill_steps": 0},
        {"decode_steps": 4},
        {"first_token_step": 0, "decode_steps": 0},
        {"first_token_step": 0, "longest_gap": None},
        {"longest_gap": link.TokenGap(duration_us=4, end_us=7, step=6)},
        {"longest_gap": link.TokenGap(duration_us=4, end_us=7, step=10)},
        {"longest_gap": link.TokenGap(duration_us=8, end_us=7, step=8)},
        {"longest_gap": link.TokenGap(duration_us=4, end_us=8, step=8)},
    ],
    ids=str,
)
def test_a_trail_that_contradicts_itself_is_struck_and_the_times_stay(changes: dict[str, object]) -> None:
    message = timed(link.SequenceTiming(decode_us=7, trail=make_trail(**changes)))
    (problem,) = strike_untrue(message)
    assert problem.startswith("timing.trail")
    assert message == timed(link.SequenceTiming(decode_us=7))
