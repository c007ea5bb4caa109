"""The referee of the ledger, checked by hand, and a small match of the ledger before it."""

from __future__ import annotations

from itertools import permutations
from random import Random

import pytest

from bench.shapley import Experts, StepCost, judge, shapley_joules
from bench.shapley_mixes import (
    GRANITE_EXPERTS,
    GRANITE_MOE,
    H100_LIKE,
    LLAMA_8B,
    MIXES,
    Mix,
    PoweredStep,
    edge_times_ns,
    referee_mix,
    run_mix,
)
from replicas.request import StepMember, StepRecord, StepRows

MS = 1_000_000
DENSE = StepCost(costs=LLAMA_8B, device=H100_LIKE)
MIXTURE = StepCost(costs=GRANITE_MOE, device=H100_LIKE, experts=GRANITE_EXPERTS)


def make_member(request_id: int, *, new_tokens: int = 1, context_tokens: int = 500) -> StepMember:
    return StepMember(
        request_id=request_id, new_tokens=new_tokens, context_tokens=context_tokens, is_prefill=new_tokens > 1
    )


def exact_shapley(members: list[StepMember], cost: StepCost) -> list[float]:
    """Over all orders, from the definition."""
    paid_j = [0.0] * len(members)
    orders = list(permutations(range(len(members))))
    for order in orders:
        for count, index in enumerate(order):
            before = [members[other] for other in order[:count]]
            paid_j[index] += cost.whole([*before, members[index]])[1] - cost.whole(before)[1]
    return [joules / len(orders) for joules in paid_j]


@pytest.mark.parametrize("cost", [DENSE, MIXTURE], ids=["dense", "experts"])
def test_sampled_orders_come_close_to_all_orders(cost: StepCost) -> None:
    members = [make_member(1), make_member(2, new_tokens=700), make_member(3, context_tokens=4000)]
    sampled = shapley_joules(members, cost, random=Random(0), num_orders=600)
    assert sum(sampled) == pytest.approx(cost.whole(members)[1])
    assert sampled == pytest.approx(exact_shapley(members, cost), rel=0.05)


def test_equal_members_share_the_step_equally() -> None:
    joules = shapley_joules([make_member(n) for n in range(4)], DENSE, random=Random(0), num_orders=400)
    assert joules == pytest.approx([DENSE.whole([make_member(0)] * 4)[1] / 4] * 4, rel=0.1)


def test_the_device_draws_what_published_rows_say() -> None:
    """Llama-8B on an H100: 3.13 J a step and 0.068 J a token, prompts included in the latter."""
    one, many = (DENSE.whole([make_member(n) for n in range(count)])[1] for count in (8, 64))
    assert one == pytest.approx(3.13 + 8 * 0.068, rel=0.25)
    assert many == pytest.approx(3.13 + 64 * 0.068, rel=0.45)


def test_more_tokens_touch_more_experts_up_to_all() -> None:
    experts = Experts(num_experts=32, per_token=8)
    assert experts.hit(1) == 8
    assert experts.hit(2) == 14
    assert experts.hit(1000) == pytest.approx(32)


def test_joules_on_the_wrong_request_are_counted_once() -> None:
    verdict = judge({1: 90.0, 2: 110.0}, {1: 100.0, 2: 100.0})
    assert (verdict.misallocated, verdict.deviation_p50) == (0.05, 0.1)


def test_every_request_of_a_mix_gets_all_its_tokens() -> None:
    steps = run_mix(MIXES[3], num_requests=20, seed=3)
    assert [one.record.step for one in steps] == list(range(1, len(steps) + 1))
    prompts = {m.request_id for one in steps for m in one.record.members if m.is_prefill}
    assert prompts == set(range(20))


@pytest.mark.parametrize("mix", MIXES, ids=[mix.name for mix in MIXES])
def test_the_ledger_stands_before_the_referee(mix: Mix) -> None:
    """With coefficients that are not this device's; the full match is `python -m bench shapley`."""
    match = referee_mix(mix, num_requests=40, num_orders=6).match()
    for verdict in (match.shipped, match.learned):
        assert verdict.misallocated < 0.05
        assert verdict.deviation_p95 < 0.35
    assert 0.95 < match.ratio < 1.05


@pytest.mark.parametrize(("window_s", "period_s", "limit"), [(0.1, None, 0.015), (0.5, 0.1, 0.02)])
def test_prompts_beside_many_decodes_are_divided_as_the_referee_would(
    window_s: float, period_s: float | None, limit: float
) -> None:
    """The hardest of the mixes: chunks of long prompts rule its steps, among dozens of short decodes."""
    trial = referee_mix(MIXES[4], num_requests=120, num_orders=24)
    learned = trial.match(window_s=window_s, period_s=period_s).learned
    assert learned.misallocated < limit
    assert learned.deviation_p95 < 0.2


def test_a_counter_is_read_at_its_edge_behind_each_end_and_first_begin_else_each_window() -> None:
    spans_ms = [(0, 130, 550), (0, 550, 950), (1, 2020, 2310)]
    steps = [
        PoweredStep(
            StepRecord(
                step=1, start_ns=start * MS, end_ns=end * MS, rows=StepRows.of([make_member(request_id)])
            ),
            energy_j=1.0,
        )
        for request_id, start, end in spans_ms
    ]
    edges_ns = edge_times_ns(steps, window_s=0.4, period_s=0.1)
    assert edges_ns == [one * MS for one in (0, 200, 600, 1000, 1400, 1800, 2100, 2400, 2800)]
