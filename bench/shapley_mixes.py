"""Six mixes of requests through a continuously batched device, billed by our ledger and judged by Shapley.

The device is simulated and draws other power than the ledger's coefficients say, so this bounds the error of
the ledger's structure (members per step, fixed pool, meter windows), not that of a real device's physics.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from random import Random

from bench.record import write_results
from bench.shapley import Experts, RefereeDevice, StepCost, Verdict, judge, shapley_joules
from replicas.energy.learning import CoefficientLearner
from replicas.energy.ledger import Ledger
from replicas.energy.meter import Reading, Source
from replicas.energy.weights import GPU_COEFFICIENTS
from replicas.request import EngineCosts, StepMember, StepRecord, StepRows

STEP_TOKENS = 2048
MAX_SEQUENCES = 128
EDGE_S = 0.1
IDLE_W = 110.0
NS = 1_000_000_000

LLAMA_8B = EngineCosts(
    active_params=8_030_000_000,
    shared_weight_bytes=16_060_000_000,
    expert_bytes=0,
    num_layers=32,
    attention_dim=4096,
    kv_bytes_per_token=131_072,
)
GRANITE_MOE = EngineCosts(
    active_params=400_000_000,
    shared_weight_bytes=420_000_000,
    expert_bytes=3 * 1024 * 512 * 2,
    num_layers=24,
    attention_dim=1024,
    kv_bytes_per_token=49_152,
)
GRANITE_EXPERTS = Experts(num_experts=32, per_token=8)

H100_LIKE = RefereeDevice(
    joules_per_flop=5.0e-13,
    joules_per_byte=1.4e-10,
    flops_per_s=6.0e14,
    bytes_per_s=2.8e12,
    static_w=210.0,
    step_s=1.5e-3,
    sequence_s=1.5e-5,
)
"""Llama-8B decodes on it at about 3.1 J a step + 0.06 J a sequence, as published H100 rows do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Requests that come at random times; each draws one of `shapes`: mean prompt and output tokens."""

    name: str
    per_second: float
    shapes: tuple[tuple[int, int], ...]
    is_moe: bool = False

    @property
    def cost(self) -> StepCost:
        if self.is_moe:
            return StepCost(costs=GRANITE_MOE, device=H100_LIKE, experts=GRANITE_EXPERTS)
        return StepCost(costs=LLAMA_8B, device=H100_LIKE)


MIXES = (
    Mix(name="chat, 2/s", per_second=2.0, shapes=((300, 200),)),
    Mix(name="chat, 15/s", per_second=15.0, shapes=((300, 200),)),
    Mix(name="rag, 4/s", per_second=4.0, shapes=((3000, 120),)),
    Mix(name="bimodal, 3/s", per_second=3.0, shapes=((150, 250), (4000, 60))),
    Mix(name="bimodal, 10/s", per_second=10.0, shapes=((150, 250), (4000, 60))),
    Mix(name="chat on a mixture of experts, 15/s", per_second=15.0, shapes=((300, 200),), is_moe=True),
)


@dataclass(slots=True)
class _Sequence:
    request_id: int
    start_s: float
    prompt_tokens: int
    output_tokens: int
    context_tokens: int = 0

    @property
    def left_tokens(self) -> int:
        """Tokens of the prompt still to compute."""
        return max(0, self.prompt_tokens - self.context_tokens)

    @property
    def is_done(self) -> bool:
        return self.context_tokens >= self.prompt_tokens + self.output_tokens - 1


@dataclass(frozen=True, slots=True)
class PoweredStep:
    """A step with the joules that the device drew while it ran."""

    record: StepRecord
    energy_j: float


def run_mix(mix: Mix, *, num_requests: int, seed: int) -> list[PoweredStep]:
    """All steps of a mix, from the first arrival to the last token: chunked prefill and decode together."""
    random = Random(seed)
    arrivals = deque(_arrivals(mix, random, num_requests))
    running: list[_Sequence] = []
    steps: list[PoweredStep] = []
    now_s = 0.0
    while arrivals or running:
        while arrivals and len(running) < MAX_SEQUENCES and arrivals[0].start_s <= now_s:
            running.append(arrivals.popleft())
        if not running:
            now_s = arrivals[0].start_s
            continue
        members = _schedule(running)
        time_s, energy_j = mix.cost.whole(members)
        record = StepRecord(
            step=len(steps) + 1,
            start_ns=round(now_s * NS),
            end_ns=round((now_s + time_s) * NS),
            rows=StepRows.of(members),
            experts_hit=round(mix.cost.experts_hit(sum(member.new_tokens for member in members))),
        )
        steps.append(PoweredStep(record, energy_j))
        now_s += time_s
        grown = {member.request_id: member.new_tokens for member in members}
        for sequence in running:
            sequence.context_tokens += grown.get(sequence.request_id, 0)
        running = [sequence for sequence in running if not sequence.is_done]
    return steps


def _arrivals(mix: Mix, random: Random, num_requests: int) -> list[_Sequence]:
    sequences = []
    now_s = 0.0
    for request_id in range(num_requests):
        now_s += random.expovariate(mix.per_second)
        prompt, output = random.choice(mix.shapes)
        sequences.append(
            _Sequence(
                request_id,
                now_s,
                max(1, round(prompt * random.lognormvariate(0.0, 0.5))),
                max(2, round(output * random.lognormvariate(0.0, 0.5))),
            )
        )
    return sequences


def _schedule(running: Sequence[_Sequence]) -> tuple[StepMember, ...]:
    """A token for each that decodes, and prompts in order of arrival up to the step's budget."""
    members = []
    budget = STEP_TOKENS - sum(not sequence.left_tokens for sequence in running)
    for sequence in running:
        left = sequence.left_tokens
        new_tokens = min(left, budget) if left else 1
        if left:
            budget -= new_tokens
        if new_tokens:
            members.append(
                StepMember(
                    request_id=sequence.request_id,
                    new_tokens=new_tokens,
                    context_tokens=sequence.context_tokens,
                    is_prefill=left > 0,
                )
            )
    return tuple(members)


def edge_times_ns(
    steps: Sequence[PoweredStep], *, window_s: float, period_s: float | None = None
) -> list[int]:
    """When the meter is read, from 0 until all steps have ended: each `window_s`.

    With `period_s`, as the agent reads a counter that moves each `period_s` (`read_pace.py`): at the edge
    behind each end of a request, and each begin of one that is alone; else `window_s` after the last.
    """
    every_ns = round((window_s if period_s is None else period_s) * NS)
    asks_ns = [] if period_s is None else sorted(_asks_ns(steps))
    times_ns = [0]
    for edge_ns in range(every_ns, steps[-1].record.end_ns + 2 * round(window_s * NS), every_ns):
        num_asks = bisect_right(asks_ns, edge_ns)
        if num_asks or edge_ns - times_ns[-1] >= window_s * NS:
            times_ns.append(edge_ns)
        del asks_ns[:num_asks]
    return times_ns


def _asks_ns(steps: Sequence[PoweredStep]) -> Iterator[int]:
    last_ns = _last_step_ns(steps)
    before: frozenset[int] = frozenset()
    for one in steps:
        members = frozenset(member.request_id for member in one.record.members)
        if not before:
            yield one.record.start_ns
        before = frozenset(name for name in members if last_ns[name] > one.record.end_ns)
        if before != members:
            yield one.record.end_ns


def _last_step_ns(steps: Sequence[PoweredStep]) -> dict[int, int]:
    """When each request ended."""
    return {member.request_id: one.record.end_ns for one in steps for member in one.record.members}


def bill_mix(
    mix: Mix,
    steps: Sequence[PoweredStep],
    edges_ns: Sequence[int],
    *,
    learner: CoefficientLearner | None = None,
) -> dict[int, float]:
    """Joules by request as our ledger bills them, from the steps' records and a meter with these edges."""
    ledger = Ledger(costs=mix.cost.costs, idle_power_w=IDLE_W, coefficients=GPU_COEFFICIENTS, learner=learner)
    ending = deque(sorted((end_ns, name) for name, end_ns in _last_step_ns(steps).items()))
    bills: dict[int, float] = {}
    ledger.add_reading(Reading(t_ns=0, energy_mj=0, source=Source.COUNTER))
    pending = deque(steps)
    energy_mj = 0
    carry_j = 0.0
    for start_ns, edge_ns in pairwise(edges_ns):
        carry_j += IDLE_W * (edge_ns - start_ns) / NS
        while pending and pending[0].record.start_ns < edge_ns:
            one = pending[0]
            began_ns, ended_ns = one.record.start_ns, one.record.end_ns
            inside_ns = min(ended_ns, edge_ns) - max(began_ns, start_ns)
            carry_j += one.energy_j * inside_ns / (ended_ns - began_ns) - IDLE_W * inside_ns / NS
            if began_ns >= start_ns:
                ledger.add_step(one.record)
            if ended_ns > edge_ns:
                break
            pending.popleft()
        while ending and ending[0][0] <= edge_ns:
            ended_ns, request_id = ending.popleft()
            ledger.end_request(request_id, ended_ns)
        whole_mj = int(carry_j * 1e3)
        energy_mj, carry_j = energy_mj + whole_mj, carry_j - whole_mj / 1e3
        ledger.add_reading(Reading(t_ns=edge_ns, energy_mj=energy_mj, source=Source.COUNTER))
        ledger.advance(edge_ns)
        for bill in ledger.take_closed():
            bills[bill.request_id] = bill.total_mj / 1e3
    return bills


def due_joules(mix: Mix, steps: Sequence[PoweredStep], *, num_orders: int, seed: int = 0) -> dict[int, float]:
    """Joules by request as the referee has them: the sum of its Shapley values over all steps."""
    random = Random(seed)
    due: dict[int, float] = {}
    for one in steps:
        members = one.record.members
        shares = shapley_joules(members, mix.cost, random=random, num_orders=num_orders)
        for member, joules in zip(members, shares, strict=True):
            due[member.request_id] = due.get(member.request_id, 0.0) + joules
    return due


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One mix before the referee: billed by the shipped coefficients, and by those learned on the way.

    `ratio` is the learner's predicted by metered energy at the end.
    """

    edges_per_s: float
    shipped: Verdict
    learned: Verdict
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The steps of a mix, and what the referee says is due for them; bills come and go."""

    mix: Mix
    steps: Sequence[PoweredStep]
    due: Mapping[int, float]

    def match(self, *, window_s: float = EDGE_S, period_s: float | None = None) -> Match:
        """Bill by the edges of `edge_times_ns`, twice, and judge. Learning begins with the first request."""
        edges_ns = edge_times_ns(self.steps, window_s=window_s, period_s=period_s)
        learner = CoefficientLearner(GPU_COEFFICIENTS)
        learned = judge(bill_mix(self.mix, self.steps, edges_ns, learner=learner), self.due)
        assert learner.ratio is not None, "a mix has windows to learn from"
        return Match(
            edges_per_s=len(edges_ns) / edges_ns[-1] * NS,
            shipped=judge(bill_mix(self.mix, self.steps, edges_ns), self.due),
            learned=learned,
            ratio=learner.ratio,
        )


def referee_mix(mix: Mix, *, num_requests: int, num_orders: int, seed: int = 1) -> Trial:
    """Run one mix, and say what is due."""
    steps = run_mix(mix, num_requests=num_requests, seed=seed)
    return Trial(mix=mix, steps=steps, due=due_joules(mix, steps, num_orders=num_orders))


def run_shapley(num_requests: int, num_orders: int, windows_s: Sequence[float], path: Path | None) -> None:
    """All mixes, billed by windows of each length: print and write what the referee finds."""
    rows: list[dict[str, object]] = []
    for mix in MIXES:
        trial = referee_mix(mix, num_requests=num_requests, num_orders=num_orders)
        about = {"mix": mix.name, "requests": num_requests, "steps": len(trial.steps), "orders": num_orders}
        for window_s, period_s in product(windows_s, (None, EDGE_S)):
            edges = {"window_s": window_s, "is_asked": period_s is not None}
            for row in _rows(trial.match(window_s=window_s, period_s=period_s)):
                rows.append(about | edges | row)
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(write_results("shapley", rows, path))


def _rows(match: Match) -> Iterator[dict[str, object]]:
    for name, verdict in (("shipped", match.shipped), ("learned", match.learned)):
        yield {
            "edges_per_s": round(match.edges_per_s, 2),
            "coefficients": name,
            "misallocated_percent": round(100 * verdict.misallocated, 3),
            "deviation_p50_percent": round(100 * verdict.deviation_p50, 3),
            "deviation_p95_percent": round(100 * verdict.deviation_p95, 3),
        } | ({"calibration_ratio": round(match.ratio, 4)} if name == "learned" else {})
