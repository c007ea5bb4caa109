"""How much of one forward pass each member caused: pure arithmetic, no meter, no state.

The model has a pool that every member shares equally (the weights a step reads, its fixed overhead), a part
that grows with the arithmetic of a member and a part that grows with the bytes it reads. So a step has three
prices, and what a member weighs is linear in its own work. Only ratios matter: the ledger scales them to what
the meter counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import mul
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from replicas.request import EngineCosts, StepMember, StepRecord

Tokens = TypeVar("Tokens", int, NDArray[np.float64])
"""Of one member, or of one in each row."""


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


NO_WORK = StepWork(0.0, 0.0, 0.0)


class StepPrice(NamedTuple):
    """Modelled joules of a member of one step by its own FLOP, by its own KV bytes, and for being in it.

    The `static_` ones are the part of each that the device draws whatever it computes.
    """

    flop: float
    octet: float
    each: float
    static_flop: float
    static_octet: float
    static_each: float


FREE = StepPrice(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class StepRows(NamedTuple):
    """The members of a step by column, in the order of its record."""

    request_ids: tuple[int, ...]
    new_tokens: tuple[int, ...]
    context_tokens: tuple[int, ...]
    is_prefill: tuple[bool, ...]
    wasted_tokens: tuple[int, ...]

    @property
    def has_a_token_each(self) -> bool:
        return sum(self.new_tokens) == len(self.new_tokens)


NO_ROWS = StepRows((), (), (), (), ())


def coefficients_for(device: str) -> DeviceCoefficients:
    """Coefficients of a torch device name: `cpu`, or `cuda` and `cuda:1` for the GPU class."""
    return CPU_COEFFICIENTS if device.partition(":")[0] == "cpu" else GPU_COEFFICIENTS


def rows_of(members: tuple[StepMember, ...]) -> StepRows:
    """`members` are tuples with the fields of a row, in that order; at least one."""
    return StepRows(*zip(*members, strict=True))


class MemberCosts:
    """The work of a member from its tokens: FLOP, and bytes of KV."""

    def __init__(self, costs: EngineCosts) -> None:
        self.engine = costs
        self._flop_base = 2 * costs.active_params
        self._flop_context = 4 * costs.num_layers * costs.attention_dim
        self._kv_bytes = costs.kv_bytes_per_token

    def flops(self, new: Tokens, context: Tokens) -> Tokens:
        """Every new token meets all parameters, and attends to what is before it."""
        return new * self._flop_base + new * (2 * context + new) * (self._flop_context // 2)

    def octets(self, new: Tokens, context: Tokens) -> Tokens:
        return (context + new) * self._kv_bytes

    def sums(self, rows: StepRows) -> tuple[int, int]:
        """FLOP and KV bytes of all members of a step, exactly."""
        new, context = sum(rows.new_tokens), sum(rows.context_tokens)
        if new == len(rows.new_tokens):
            pairs = 2 * context + new
        else:
            pairs = 2 * sum(map(mul, rows.new_tokens, rows.context_tokens))
            pairs += sum(map(mul, rows.new_tokens, rows.new_tokens))
        return new * self._flop_base + pairs * (self._flop_context // 2), (context + new) * self._kv_bytes


def price_step(
    record: StepRecord, rows: StepRows, costs: MemberCosts, device: DeviceCoefficients
) -> tuple[StepPrice, StepWork]:
    """Prices that add up to the step's modelled joules over its members; `each` is above zero.

    The time of the step is the measured one. Inside it, the slower of arithmetic and memory traffic rules.
    Grow all members together from nothing: weights are read first, so memory rules until arithmetic catches
    up with it, at the part `memory` of the whole batch (1: never). What one more FLOP or byte costs on the
    way is its Aumann-Shapley price; it is continuous where the two change places, and whole batches of a
    decode are divided as if memory alone were there.
    """
    member_count = len(rows.request_ids)
    own_flops, own_octets = costs.sums(rows)
    weight_bytes = costs.engine.shared_weight_bytes + costs.engine.expert_bytes * record.experts_hit
    seconds = max(record.end_ns - record.start_ns, 1) * 1e-9
    work = StepWork(seconds, own_flops, own_octets + weight_bytes)

    flop_s, byte_s = 1.0 / device.flops_per_s, 1.0 / device.bytes_per_s
    lead_s, pool_s = flop_s * own_flops - byte_s * own_octets, byte_s * weight_bytes
    memory = pool_s / lead_s if lead_s > pool_s else 1.0
    bound_s = max(flop_s * own_flops, byte_s * work.traffic_bytes)
    model_s = bound_s + device.step_s + member_count * device.sequence_s
    watts = device.static_w * seconds / model_s
    static_flop = watts * (1.0 - memory) * flop_s
    static_octet = watts * memory * byte_s
    static_each = watts * ((pool_s + device.step_s) / member_count + device.sequence_s)
    price = StepPrice(
        static_flop + device.joules_per_flop,
        static_octet + device.joules_per_byte,
        static_each + device.joules_per_byte * weight_bytes / member_count,
        static_flop,
        static_octet,
        static_each,
    )
    return price, work
