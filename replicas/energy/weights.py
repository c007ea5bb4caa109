"""How much of one forward pass each member caused: pure arithmetic, no meter, no state.

The model has a pool that every member shares equally (the weights a step reads, its fixed overhead), a part
that grows with the arithmetic of a member and a part that grows with the bytes it reads. Only ratios matter:
the ledger scales them to what the meter counted. Called by `ledger.py`, once per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from replicas.request import EngineCosts, StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCoefficients:
    """What work costs one class of device. `static_w` is drawn while a step runs, whatever it computes.

    `step_s` is the fixed part of a step (launches, scheduling), `sequence_s` comes once per member.
    """

    joules_per_flop: float
    joules_per_byte: float
    flops_per_s: float
    bytes_per_s: float
    static_w: float
    step_s: float
    sequence_s: float


GPU_COEFFICIENTS = DeviceCoefficients(
    joules_per_flop=8.0e-13,
    joules_per_byte=1.1e-10,
    flops_per_s=5.0e14,
    bytes_per_s=2.6e12,
    static_w=200.0,
    step_s=1.0e-3,
    sequence_s=2.0e-5,
)
"""H100 class. For Llama-8B in bf16 they give 3.4 J per decode step of 8, 0.02 J per prompt token."""

CPU_COEFFICIENTS = DeviceCoefficients(
    joules_per_flop=0.0,
    joules_per_byte=0.0,
    flops_per_s=5.0e10,
    bytes_per_s=1.0e10,
    static_w=10.0,
    step_s=5.0e-4,
    sequence_s=1.0e-4,
)
"""The estimate for CPUs knows nothing but busy time, so time alone weighs."""


class StepWork(NamedTuple):
    """What a step did as a whole: seconds it took, FLOP, and bytes of weights and KV it read."""

    seconds: float
    flops: float
    traffic_bytes: float


class MemberWeight(NamedTuple):
    """Modelled joules of one member in one step; `static` and `wasted` are parts of `weight`."""

    request_id: int
    weight: float
    static: float
    wasted: float
    is_prefill: bool


class WeighedStep(NamedTuple):
    """A step's members in the order of its record, and its work as a whole."""

    members: tuple[MemberWeight, ...]
    work: StepWork


NO_WORK = StepWork(0.0, 0.0, 0.0)


def coefficients_for(device: str) -> DeviceCoefficients:
    """Coefficients of a torch device name: `cpu`, or `cuda` and `cuda:1` for the GPU class."""
    return CPU_COEFFICIENTS if device.partition(":")[0] == "cpu" else GPU_COEFFICIENTS


def weigh_step(record: StepRecord, costs: EngineCosts, device: DeviceCoefficients) -> WeighedStep:
    """Weights of the members of `record`; all above zero, so a step is never unowned.

    The time of the step is the measured one. Inside it, arithmetic and memory traffic share by the square of
    the time each alone would take: the larger one rules, and nothing jumps where they change places.
    """
    members = record.members
    if not members:
        return WeighedStep((), NO_WORK)
    member_count = len(members)
    weight_bytes = costs.shared_weight_bytes + costs.expert_bytes * record.experts_hit
    bytes_each = weight_bytes / member_count
    flop_base = 2 * costs.active_params
    flop_context = 4 * costs.num_layers * costs.attention_dim
    kv_bytes = costs.kv_bytes_per_token
    flops = [
        m.new_tokens * (flop_base + flop_context * (m.context_tokens + m.new_tokens / 2)) for m in members
    ]
    traffic = [kv_bytes * (m.context_tokens + m.new_tokens) + bytes_each for m in members]

    seconds = max(record.end_ns - record.start_ns, 1) * 1e-9
    work = StepWork(seconds, sum(flops), sum(traffic))
    flop_s = work.flops / device.flops_per_s
    byte_s = work.traffic_bytes / device.bytes_per_s
    bound_s = math.hypot(flop_s, byte_s)
    model_s = bound_s + device.step_s + member_count * device.sequence_s
    watts = device.static_w * seconds / model_s
    static_flop = watts * flop_s / (bound_s * device.flops_per_s) if bound_s else 0.0
    static_byte = watts * byte_s / (bound_s * device.bytes_per_s) if bound_s else 0.0
    static_each = watts * (device.step_s / member_count + device.sequence_s)

    weights = []
    for member, flop, octets in zip(members, flops, traffic, strict=True):
        static = static_flop * flop + static_byte * octets + static_each
        weight = static + device.joules_per_flop * flop + device.joules_per_byte * octets
        wasted = weight * member.wasted_tokens / member.new_tokens if member.wasted_tokens else 0.0
        weights.append(MemberWeight(member.request_id, weight, static, wasted, member.is_prefill))
    return WeighedStep(tuple(weights), work)
