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

from replicas.request import EngineCosts, StepMember

Column = NDArray[np.float64]
"""A number per member, per step or per request."""


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


class StepRows(NamedTuple):
    """The members of a step by column, in the order of its record."""

    request_ids: tuple[int, ...]
    new_tokens: tuple[int, ...]
    context_tokens: tuple[int, ...]
    is_prefill: tuple[bool, ...]
    wasted_tokens: tuple[int, ...]


NO_ROWS = StepRows((), (), (), (), ())


def coefficients_for(device: str) -> DeviceCoefficients:
    """Coefficients of a torch device name: `cpu`, or `cuda` and `cuda:1` for the GPU class."""
    return CPU_COEFFICIENTS if device.partition(":")[0] == "cpu" else GPU_COEFFICIENTS


def rows_of(members: tuple[StepMember, ...]) -> StepRows:
    """`members` are tuples with the fields of a row, in that order; at least one."""
    return StepRows(*zip(*members, strict=True))


class MemberCosts:
    """The work of members from their tokens: FLOP, and bytes of KV; and the bytes of weights of a step."""

    def __init__(self, costs: EngineCosts) -> None:
        self._flop_base = 2.0 * costs.active_params
        self._flop_pair = 2.0 * costs.num_layers * costs.attention_dim
        self._kv_bytes = float(costs.kv_bytes_per_token)
        self._shared_bytes = max(1.0, costs.shared_weight_bytes)
        self._expert_bytes = float(costs.expert_bytes)

    def flops(self, new: Column, context: Column) -> Column:
        """Every new token meets all parameters, and attends to what is before it."""
        return new * ((2.0 * context + new) * self._flop_pair + self._flop_base)

    def octets(self, new: Column, context: Column) -> Column:
        return (context + new) * self._kv_bytes

    def weight_bytes(self, experts_hit: Column) -> Column:
        """Of whole steps; one at least, whatever the model."""
        return experts_hit * self._expert_bytes + self._shared_bytes


def price_steps(
    *,
    seconds: Column,
    flops: Column,
    octets: Column,
    weight_bytes: Column,
    num_members: Column,
    device: DeviceCoefficients,
) -> Column:
    """Prices that add up to each step's modelled joules over its members: six rows, a column per step.

    Modelled joules of a member by its own FLOP, by its own KV bytes, and (above zero) for being in the step;
    then the part of each that the device draws whatever it computes.

    The time of a step is the measured one. Inside it, the slower of arithmetic and memory traffic rules.
    Grow all members together from nothing: weights are read first, so memory rules until arithmetic catches
    up with it, at the part `pool_s / bound_s` of the whole batch (1: never). What one more FLOP or byte costs
    on the way is its Aumann-Shapley price; it is continuous where the two change places, and whole batches of
    a decode are divided as if memory alone were there.
    """
    flop_s, byte_s = 1.0 / device.flops_per_s, 1.0 / device.bytes_per_s
    read_s, pool_s = octets * byte_s, weight_bytes * byte_s
    bound_s = np.maximum(flops * flop_s - read_s, pool_s)
    model_s = read_s + bound_s + (num_members * device.sequence_s + device.step_s)
    watts = seconds * device.static_w / model_s
    memory_watts = watts * (pool_s / bound_s)
    prices = np.empty((6, len(seconds)))
    prices[3] = (watts - memory_watts) * flop_s
    prices[4] = memory_watts * byte_s
    prices[5] = watts * ((pool_s + device.step_s) / num_members + device.sequence_s)
    prices[0] = prices[3] + device.joules_per_flop
    prices[1] = prices[4] + device.joules_per_byte
    prices[2] = prices[5] + weight_bytes * device.joules_per_byte / num_members
    return prices
