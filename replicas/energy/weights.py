"""How much of one forward pass each member caused: pure arithmetic, no meter, no state.

The model has a pool that every member shares equally (the weights a step reads, its fixed overhead), a part
that grows with the arithmetic of a member and a part that grows with the bytes it reads. So a step has three
prices, and what a member weighs is linear in its own work. Only ratios matter: the ledger scales them to what
the meter counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from replicas.request import EngineCosts, StepMember, StepRows

Column = NDArray[np.float64]
"""A number per member or per request."""
Integers = NDArray[np.int64]


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
    """What steps did together: seconds they took, FLOP, and bytes of weights and KV they read."""

    seconds: float
    flops: float
    traffic_bytes: float


Prices = tuple[float, float, float]
"""Joules of a member by its own FLOP, by its own KV bytes, and (above zero) for being in the step."""


def coefficients_for(device: str) -> DeviceCoefficients:
    """Coefficients of a torch device name: `cpu`, or `cuda` and `cuda:1` for the GPU class."""
    return CPU_COEFFICIENTS if device.partition(":")[0] == "cpu" else GPU_COEFFICIENTS


class MemberCosts:
    """The work of members from their tokens: FLOP, and bytes of KV; and the bytes of weights of a step.

    Every new token meets all parameters, and attends to what is before it. So of a member with one new token
    both are a line over its context, and what it weighs is one.
    """

    def __init__(self, costs: EngineCosts) -> None:
        self._flop_base = 2.0 * costs.active_params
        self._flop_pair = 2.0 * costs.num_layers * costs.attention_dim
        self._plain_flops = self._flops(1, 0)
        self._kv_bytes = float(costs.kv_bytes_per_token)
        self._shared_bytes = max(1.0, costs.shared_weight_bytes)
        self._expert_bytes = float(costs.expert_bytes)
        base = (self._plain_flops, self._kv_bytes, 1.0)
        slope = (2.0 * self._flop_pair, self._kv_bytes, 0.0)
        nothing = (0.0, 0.0, 0.0)
        self._lines = np.array(
            [
                (*base, *nothing),
                (*nothing, *base),
                (*slope, *nothing),
                (*nothing, *slope),
            ]
        )

    def work(self, rows: StepRows, *, num_members: int, context_tokens: int) -> tuple[float, float]:
        """FLOP and KV bytes of a step's members, whose contexts add up to `context_tokens`."""
        flops = self._plain_flops * num_members + 2.0 * self._flop_pair * context_tokens
        num_tokens = num_members + context_tokens
        for _, member in rows.others:
            flops += self._flops(member.new_tokens, member.context_tokens)
            flops -= self._flops(1, member.context_tokens)
            num_tokens += member.new_tokens - 1
        return flops, num_tokens * self._kv_bytes

    def weight_bytes(self, experts_hit: int) -> float:
        """Of a whole step; one at least, whatever the model."""
        return experts_hit * self._expert_bytes + self._shared_bytes

    def weight(self, member: StepMember, prices: Prices) -> float:
        flop, kv_byte, each = prices
        new, context = member.new_tokens, member.context_tokens
        return flop * self._flops(new, context) + kv_byte * self._kv_bytes * (context + new) + each

    def lines(self, prices: Column) -> Column:
        """By step: what each member with one new token weighs, the static part of it, and what each token of
        its context adds to either. `prices`: three rows, and three of the static part.
        """
        return self._lines @ prices

    def _flops(self, new: int, context: int) -> float:
        return new * ((2 * context + new) * self._flop_pair + self._flop_base)


def price_step(
    *,
    seconds: float,
    flops: float,
    kv_bytes: float,
    weight_bytes: float,
    num_members: int,
    device: DeviceCoefficients,
) -> tuple[Prices, Prices]:
    """Prices that add up to a step's modelled joules over its members; then the static part of each.

    Static is what the device draws whatever it computes. The time of a step is the measured one. Inside it,
    the slower of arithmetic and memory traffic rules. Grow all members together from nothing: weights are
    read first, so memory rules until arithmetic catches up with it, at the part `pool_s / bound_s` of the
    whole batch (1: never). What one more FLOP or byte costs on the way is its Aumann-Shapley price; it is
    continuous where the two change places, and whole batches of a decode are divided as if memory alone were
    there.
    """
    flop_s, byte_s = 1.0 / device.flops_per_s, 1.0 / device.bytes_per_s
    read_s, pool_s = kv_bytes * byte_s, weight_bytes * byte_s
    bound_s = max(flops * flop_s - read_s, pool_s)
    model_s = read_s + bound_s + num_members * device.sequence_s + device.step_s
    watts = seconds * device.static_w / model_s
    memory_watts = watts * (pool_s / bound_s)
    flop, kv_byte = (watts - memory_watts) * flop_s, memory_watts * byte_s
    each = watts * ((pool_s + device.step_s) / num_members + device.sequence_s)
    pool_j = weight_bytes * device.joules_per_byte
    whole = flop + device.joules_per_flop, kv_byte + device.joules_per_byte, each + pool_j / num_members
    return whole, (flop, kv_byte, each)
