"""The referee of the ledger: what each member of a step ought to pay, by Shapley value. Pure.

A device is modelled by what it draws for any set of sequences: time by the slower of arithmetic and memory,
a fixed part per step, and joules per FLOP and byte. The weights are read once whoever is there, and a mixture
of experts reads more of them the more tokens there are. The Shapley value splits that cost in the one way
that is efficient, symmetric and gives nothing to who costs nothing; here by sampled orders of arrival. Too
slow to bill by (a cost per member and order), and right to judge bills by. `shapley_mixes.py` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from bench.record import percentile
from replicas.request import EngineCosts, StepMember


@dataclass(frozen=True, slots=True, kw_only=True)
class RefereeDevice:
    """A device as physics has it, not as the ledger's coefficients do."""

    joules_per_flop: float
    joules_per_byte: float
    flops_per_s: float
    bytes_per_s: float
    static_w: float
    step_s: float
    sequence_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of each layer of a mixture: `num_experts`, of which a token takes `per_token`."""

    num_experts: int
    per_token: int

    def hit(self, num_tokens: int) -> float:
        """Expected distinct experts of one layer that `num_tokens` tokens touch, routed evenly."""
        return self.num_experts * (1.0 - (1.0 - self.per_token / self.num_experts) ** num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds and joules of a step with any members."""

    costs: EngineCosts
    device: RefereeDevice
    experts: Experts | None = None

    def flops(self, member: StepMember) -> float:
        context = member.context_tokens + member.new_tokens / 2
        per_token = (
            2 * self.costs.active_params + 4 * self.costs.num_layers * self.costs.attention_dim * context
        )
        return member.new_tokens * per_token

    def kv_bytes(self, member: StepMember) -> float:
        return self.costs.kv_bytes_per_token * (member.context_tokens + member.new_tokens)

    def experts_hit(self, num_tokens: int) -> float:
        """Over all layers; 0 for a dense model."""
        return self.costs.num_layers * self.experts.hit(num_tokens) if self.experts else 0.0

    def of(self, *, num_members: int, num_tokens: int, flops: float, kv_bytes: float) -> tuple[float, float]:
        """(seconds, joules) of a step with these sums over its members; nobody costs nothing."""
        if not num_members:
            return 0.0, 0.0
        device, costs = self.device, self.costs
        octets = costs.shared_weight_bytes + costs.expert_bytes * self.experts_hit(num_tokens) + kv_bytes
        bound_s = max(flops / device.flops_per_s, octets / device.bytes_per_s)
        time_s = bound_s + device.step_s + num_members * device.sequence_s
        work_j = device.joules_per_flop * flops + device.joules_per_byte * octets
        return time_s, device.static_w * time_s + work_j

    def whole(self, members: Sequence[StepMember]) -> tuple[float, float]:
        """(seconds, joules) of a step with all of `members`."""
        return self.of(
            num_members=len(members),
            num_tokens=sum(member.new_tokens for member in members),
            flops=math.fsum(self.flops(member) for member in members),
            kv_bytes=math.fsum(self.kv_bytes(member) for member in members),
        )


def shapley_joules(
    members: Sequence[StepMember], cost: StepCost, *, random: Random, num_orders: int
) -> list[float]:
    """What each member ought to pay: its mean extra cost over sampled orders, which add up to the step's.

    Orders come in pairs, one the reverse of the other: that takes out most of the sampling error.
    """
    terms = [(member.new_tokens, cost.flops(member), cost.kv_bytes(member)) for member in members]
    paid_j = [0.0] * len(members)
    order = list(range(len(members)))
    for number in range(num_orders):
        if number % 2:
            order.reverse()
        else:
            random.shuffle(order)
        tokens, flops, octets, before_j = 0, 0.0, 0.0, 0.0
        for count, index in enumerate(order, start=1):
            tokens, flops, octets = (
                tokens + terms[index][0],
                flops + terms[index][1],
                octets + terms[index][2],
            )
            _, after_j = cost.of(num_members=count, num_tokens=tokens, flops=flops, kv_bytes=octets)
            paid_j[index] += after_j - before_j
            before_j = after_j
    return [joules / num_orders for joules in paid_j]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How far bills are from the referee: the part of all joules on the wrong request, and deviations."""

    misallocated: float
    deviation_p50: float
    deviation_p95: float


def judge(billed: Mapping[int, float], due: Mapping[int, float]) -> Verdict:
    """Compare bills with what was due; both in joules by request, over the same requests."""
    assert billed.keys() == due.keys(), "every request is judged"
    wrong = math.fsum(abs(billed[name] - due[name]) for name in due) / 2.0
    deviations = [abs(billed[name] - due[name]) / due[name] for name in due]
    return Verdict(
        misallocated=wrong / math.fsum(due.values()),
        deviation_p50=percentile(deviations, 50),
        deviation_p95=percentile(deviations, 95),
    )
