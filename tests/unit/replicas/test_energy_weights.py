"""Weights of a step against published energy curves and against fairness by permutation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, permutations
from random import Random

import numpy as np
import pytest

from replicas.energy.claims import STATIC, WASTED, WEIGHT, Claims, claims_of
from replicas.energy.weights import (
    CPU_COEFFICIENTS,
    GPU_COEFFICIENTS,
    DeviceCoefficients,
    MemberCosts,
    coefficients_for,
)
from replicas.energy.window import Share, Step
from replicas.request import EngineCosts, StepMember, StepRecord, StepRows

MS = 1_000_000
LLAMA_8B = EngineCosts(
    active_params=8_000_000_000,
    shared_weight_bytes=16_000_000_000,
    expert_bytes=0,
    num_layers=32,
    attention_dim=4096,
    kv_bytes_per_token=131_072,
)
NOTHING = EngineCosts(
    active_params=0,
    shared_weight_bytes=0,
    expert_bytes=0,
    num_layers=0,
    attention_dim=0,
    kv_bytes_per_token=0,
)


def decode(request_id: int, context: int = 500) -> StepMember:
    return StepMember(request_id=request_id, new_tokens=1, context_tokens=context, is_prefill=False)


def prefill(request_id: int, tokens: int, *, wasted: int = 0) -> StepMember:
    return StepMember(
        request_id=request_id, new_tokens=tokens, context_tokens=0, is_prefill=True, wasted_tokens=wasted
    )


def make_step(*members: StepMember, duration_ms: float = 8.0, experts_hit: int = 0) -> StepRecord:
    return StepRecord(
        step=1, start_ns=0, end_ns=round(duration_ms * MS), rows=StepRows.of(members), experts_hit=experts_hit
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberWeight:
    request_id: int
    weight: float
    static: float
    wasted: float


def claims_alone(record: StepRecord, costs: EngineCosts, device: DeviceCoefficients) -> Claims:
    """As a window sees them that holds this step alone; a request's id is its place."""
    step = Step(record.start_ns, record.end_ns, record.step, record.rows, record.experts_hit)
    share = Share(step, step.duration_ns, 0, step.duration_ns)
    return claims_of([share], MemberCosts(costs), device, places=[np.array(step.rows.ids)])


def step_weights(
    record: StepRecord, costs: EngineCosts, device: DeviceCoefficients
) -> tuple[MemberWeight, ...]:
    """In the order of the members."""
    table = claims_alone(record, costs, device).table
    return tuple(
        MemberWeight(
            request_id=place,
            weight=float(table[WEIGHT, place]),
            static=float(table[STATIC, place]),
            wasted=float(table[WASTED, place]),
        )
        for place in record.rows.ids
    )


def joules(record: StepRecord, costs: EngineCosts = LLAMA_8B) -> float:
    return sum(member.weight for member in step_weights(record, costs, GPU_COEFFICIENTS))


@pytest.mark.parametrize(
    ("batch", "itl_ms", "published_j_per_token"), [(8, 7.3, 0.455), (64, 9.9, 0.119), (256, 26.0, 0.077)]
)
def test_decode_of_an_8b_model_costs_what_was_published_for_an_h100(
    batch: int, itl_ms: float, published_j_per_token: float
) -> None:
    """The published figure also holds the prompts of those requests, so ours is below it."""
    record = make_step(*(decode(request_id) for request_id in range(batch)), duration_ms=itl_ms)
    assert joules(record) / batch == pytest.approx(published_j_per_token, rel=0.4)


def test_a_prompt_token_of_an_8b_model_costs_about_20_mj() -> None:
    assert joules(make_step(prefill(1, 2048), duration_ms=65.0)) / 2048 == pytest.approx(0.02, rel=0.3)


def test_equal_members_weigh_the_same_and_nothing_weighs_zero() -> None:
    for costs in (LLAMA_8B, NOTHING):
        for device in (GPU_COEFFICIENTS, CPU_COEFFICIENTS):
            first, second = step_weights(make_step(decode(1), decode(2)), costs, device)
            assert first.weight == second.weight > 0.0
            assert 0.0 < first.static <= first.weight


def test_the_members_pay_the_modelled_joules_of_their_step() -> None:
    """Where memory rules and where arithmetic does: static power for all of its time, and all of its work."""
    device = GPU_COEFFICIENTS
    for chunk in (1, 200, 2000):
        record = make_step(prefill(1, chunk), *(decode(request_id) for request_id in range(2, 20)))
        work = claims_alone(record, LLAMA_8B, device).work
        expected_j = device.static_w * work.seconds
        expected_j += device.joules_per_flop * work.flops
        expected_j += device.joules_per_byte * work.traffic_bytes
        assert joules(record) == pytest.approx(expected_j, rel=1e-9)


def test_more_work_never_lowers_the_own_share() -> None:
    """Also where arithmetic takes over from memory traffic as what bounds the step."""
    others = [decode(request_id, 1000) for request_id in range(2, 30)]
    shares = []
    for tokens in range(1, 2048, 7):
        weights = step_weights(make_step(prefill(1, tokens), *others), LLAMA_8B, GPU_COEFFICIENTS)
        shares.append(weights[0].weight / sum(member.weight for member in weights))
    assert all(later > earlier for earlier, later in pairwise(shares))
    assert max(later - earlier for earlier, later in pairwise(shares)) < 0.03


def test_experts_that_were_hit_are_paid_by_the_step_that_hit_them() -> None:
    costs = EngineCosts(
        active_params=400_000_000,
        shared_weight_bytes=500_000_000,
        expert_bytes=6_000_000,
        num_layers=24,
        attention_dim=1024,
        kv_bytes_per_token=49_152,
    )
    few, many = make_step(decode(1), experts_hit=192), make_step(decode(1), experts_hit=768)
    extra_j = 576 * 6_000_000 * GPU_COEFFICIENTS.joules_per_byte
    assert joules(many, costs) - joules(few, costs) == pytest.approx(extra_j, rel=1e-6)


def test_wasted_tokens_are_a_part_of_the_weight() -> None:
    (member,) = step_weights(make_step(prefill(1, 100, wasted=25)), LLAMA_8B, GPU_COEFFICIENTS)
    assert member.wasted == pytest.approx(member.weight / 4)


def test_a_prefix_hit_pays_for_reading_what_is_cached_and_not_for_computing_it() -> None:
    cached = StepMember(request_id=2, new_tokens=16, context_tokens=1984, is_prefill=True)
    whole, hit, short = step_weights(
        make_step(prefill(1, 2000), cached, prefill(3, 16), duration_ms=60), LLAMA_8B, GPU_COEFFICIENTS
    )
    read_j = 1984 * LLAMA_8B.kv_bytes_per_token * GPU_COEFFICIENTS.joules_per_byte
    assert short.weight + read_j < hit.weight < short.weight + 3 * read_j
    assert hit.weight < whole.weight / 20


def test_on_a_cpu_time_alone_weighs() -> None:
    one = step_weights(make_step(decode(1), duration_ms=10), LLAMA_8B, CPU_COEFFICIENTS)
    two = step_weights(make_step(prefill(1, 50), duration_ms=10), LLAMA_8B, CPU_COEFFICIENTS)
    assert one[0].weight == pytest.approx(two[0].weight)


def test_the_shares_of_mixed_steps_are_near_the_shapley_value() -> None:
    """Referee: the cost of a coalition is the energy of the step it would have made, by roofline time."""
    random = Random(0)
    misplaced = []
    for _ in range(30):
        members = [decode(0, random.randint(10, 8000)), decode(1, random.randint(10, 8000))]
        members += [prefill(2, random.randint(16, 1024)), prefill(3, random.randint(16, 1024))]
        duration_ms = roofline_s(members) * 1e3
        weights = step_weights(make_step(*members, duration_ms=duration_ms), LLAMA_8B, GPU_COEFFICIENTS)
        total = sum(member.weight for member in weights)
        fair = shapley(members)
        fair_total = sum(fair.values())
        misplaced.append(sum(abs(w.weight / total - fair[w.request_id] / fair_total) for w in weights) / 2)
    assert sum(misplaced) / len(misplaced) < 0.05


def roofline_s(members: list[StepMember]) -> float:
    device = GPU_COEFFICIENTS
    flops, octets = roofline_work(members)
    return max(flops / device.flops_per_s, octets / device.bytes_per_s) + device.step_s


def roofline_work(members: list[StepMember]) -> tuple[float, float]:
    costs = LLAMA_8B
    attention = 4 * costs.num_layers * costs.attention_dim
    flops = sum(
        m.new_tokens * (2 * costs.active_params + attention * (m.context_tokens + m.new_tokens / 2))
        for m in members
    )
    kv_bytes = sum(costs.kv_bytes_per_token * (m.context_tokens + m.new_tokens) for m in members)
    return flops, costs.shared_weight_bytes + kv_bytes


def shapley(members: list[StepMember]) -> dict[int, float]:
    def cost(coalition: list[StepMember]) -> float:
        if not coalition:
            return 0.0
        flops, octets = roofline_work(coalition)
        device = GPU_COEFFICIENTS
        dynamic_j = device.joules_per_flop * flops + device.joules_per_byte * octets
        return dynamic_j + device.static_w * roofline_s(coalition)

    value = dict.fromkeys([member.request_id for member in members], 0.0)
    orders = list(permutations(members))
    for order in orders:
        for index, member in enumerate(order):
            marginal = cost(list(order[: index + 1])) - cost(list(order[:index]))
            value[member.request_id] += marginal / len(orders)
    return value


def test_coefficients_follow_the_device() -> None:
    assert coefficients_for("cpu") is CPU_COEFFICIENTS
    assert coefficients_for("cuda:1") is GPU_COEFFICIENTS
