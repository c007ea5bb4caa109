"""The balancing policies against each other on real replicas: `wattline up` with a checkpoint, open loop.

One `up` serves the checkpoint once per policy, each on replicas of its own with a thread each. Every policy
in turn gets the same Poisson arrivals while the others idle; loads are shares of what round robin serves at
full batches in a closed loop of the same run. Half of the requests begin with one of a few prefixes. Joules
are those of the policy's own replicas: the meter's, idle ones included, and what the requests were charged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import grpc

from bench.closed_loop import run_closed_loop
from bench.record import percentile
from bench.rows import checkpoint_shape, make_workload
from bench.suites import serving
from bench.workload import ModelShape
from cluster.balancing.decision import Policy
from cluster.config import Config, parse_config
from cluster.replies import LedgerState
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from cluster.serving.stack import Stack

SEED = 20261122
LOADS = (0.3, 0.7)
POLICIES = (Policy.ROUND_ROBIN, Policy.P2C, Policy.ENERGY)
NUM_REPLICAS = 2
TTFT_MS, TPOT_MS = 1000.0, 60.0
NUM_PREFIXES, PREFIX_TOKENS = 4, 256
TAIL_TOKENS_MIN, TAIL_TOKENS_MAX = 16, 64
OUTPUT_TOKENS = 32
WARM_UP_S = 2.0
CAPACITY_STREAMS = 32
LEDGER_SETTLES_S = 1.5
"""Longer than a window of any meter and the router's next look at the replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request; `at_s` since the first."""

    at_s: float
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One answer as its client saw it."""

    at_s: float
    ttft_ms: float
    tpot_ms: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


async def measure_live(model: Path, seconds: float, rounds: int) -> list[dict[str, object]]:
    """Rows of every round, load and policy, in that order of loops: drift meets all policies alike."""
    shape = checkpoint_shape(model)
    rows: list[dict[str, object]] = []
    with serving(make_config(model)) as stack:
        capacity_per_s = await measure_capacity(stack, shape)
        for number in range(rounds):
            for load in LOADS:
                arrivals = make_arrivals(
                    load * capacity_per_s, seconds, shape, seed=f"{SEED}-{number}-{load}"
                )
                for policy in POLICIES:
                    row = {"run": "real", "model": model.name, "round": number + 1, "policy": policy.value}
                    rows.append(row | {"load": load} | await measure_policy(stack, policy, arrivals))
    return rows


def make_config(model: Path) -> Config:
    """The checkpoint under the name of every policy."""
    common = {
        "source": str(model.resolve()),
        "replicas": {"min": NUM_REPLICAS, "max": NUM_REPLICAS},
        "limits": {"max_sequences": CAPACITY_STREAMS, "context_tokens": 1024},
        "slo": {"ttft_ms": TTFT_MS, "tpot_ms": TPOT_MS, "refuse_late": False},
        "cpus_per_rank": 0.1,
    }
    sections = [common | {"name": policy.value, "balancing": policy.value} for policy in POLICIES]
    return parse_config({"models": sections, "ledger": {"enabled": False}})


async def measure_capacity(stack: Stack, shape: ModelShape) -> float:
    """Requests of the arrivals' kind that all replicas serve in a second when all of them are full."""
    workload = make_workload("mix", shape, CAPACITY_STREAMS, OUTPUT_TOKENS)
    run = await run_closed_loop(stack.addresses.grpc, Policy.ROUND_ROBIN.value, workload)
    return len(run.times) / run.wall_s


def make_arrivals(per_s: float, seconds: float, shape: ModelShape, *, seed: str) -> list[Arrival]:
    random, at_s = Random(seed), 0.0
    least = shape.vocab_size // 8

    def draw(count: int) -> list[int]:
        return random.choices(range(least, shape.vocab_size), k=count)

    prefixes = [draw(PREFIX_TOKENS) for _ in range(NUM_PREFIXES)]
    found = []
    while (at_s := at_s + random.expovariate(per_s)) < seconds:
        head = random.choice(prefixes) if random.random() < 0.5 else []
        tail = draw(random.randint(TAIL_TOKENS_MIN, TAIL_TOKENS_MAX))
        tokens = max(2, min(8 * OUTPUT_TOKENS, round(random.expovariate(1.0 / OUTPUT_TOKENS))))
        found.append(Arrival(at_s=at_s, prompt=tuple(head + tail), output_tokens=tokens))
    return found


async def measure_policy(stack: Stack, policy: Policy, arrivals: Sequence[Arrival]) -> dict[str, object]:
    """One load offered to one policy. Raises grpc.RpcError when an answer fails."""
    before = await ledger_of(stack, policy)
    since_s = time.perf_counter()
    async with grpc.aio.insecure_channel(stack.addresses.grpc) as channel, asyncio.TaskGroup() as tasks:
        stub = pb_grpc.InferenceStub(channel)
        sent = []
        for arrival in arrivals:
            await asyncio.sleep(max(0.0, since_s + arrival.at_s - time.perf_counter()))
            sent.append(tasks.create_task(ask(stub, policy, arrival)))
    wall_s = time.perf_counter() - since_s
    after = await ledger_of(stack, policy)
    ended = [task.result() for task in sent]
    tokens = sum(one.output_tokens for one in ended)
    return summarize([one for one in ended if one.at_s >= WARM_UP_S]) | {
        "output_tok_s": round(tokens / wall_s, 1),
        "joules_per_output_token": round((after.meter_mj - before.meter_mj) / 1e3 / tokens, 4),
        "busy_joules_per_output_token": round((charged_mj(after) - charged_mj(before)) / 1e3 / tokens, 4),
        "energy_source": after.source,
    }


async def ask(stub: pb_grpc.InferenceAsyncStub, policy: Policy, arrival: Arrival) -> Ended:
    request = pb.GenerateRequest(
        model=policy.value,
        tokens=pb.TokenIds(ids=arrival.prompt),
        sampling=pb.Sampling(temperature=0.0),
        limits=pb.Limits(max_tokens=arrival.output_tokens, ignore_eos=True),
        energy_wait_ms=0,
    )
    since_s, times_s, final = time.perf_counter(), [], pb.Final()
    async for response in stub.Generate(request):
        if response.HasField("final"):
            final = response.final
        elif response.delta.token_ids:
            times_s.append(time.perf_counter())
    return Ended(
        at_s=arrival.at_s,
        ttft_ms=(times_s[0] - since_s) * 1e3,
        tpot_ms=(times_s[-1] - times_s[0]) * 1e3 / (arrival.output_tokens - 1),
        prompt_tokens=final.usage.prompt_tokens,
        cached_tokens=final.usage.cached_tokens,
        output_tokens=final.usage.completion_tokens,
    )


async def ledger_of(stack: Stack, policy: Policy) -> LedgerState:
    """The ledger of the policy's replicas once what was served is in it."""
    await asyncio.sleep(LEDGER_SETTLES_S)
    state = await asyncio.to_thread(stack.status)
    assert state is not None
    model = next(one for one in state.models if one.name == policy.value)
    (ledger,) = model.ledger
    return ledger


def charged_mj(ledger: LedgerState) -> int:
    return ledger.prefill_mj + ledger.decode_mj


def summarize(ended: Sequence[Ended]) -> dict[str, object]:
    ttft_ms, tpot_ms = [one.ttft_ms for one in ended], [one.tpot_ms for one in ended]
    in_time = [one.ttft_ms <= TTFT_MS and one.tpot_ms <= TPOT_MS for one in ended]
    return {
        "requests": len(ended),
        "ttft_ms_p50": round(percentile(ttft_ms, 50), 1),
        "ttft_ms_p99": round(percentile(ttft_ms, 99), 1),
        "tpot_ms_p99": round(percentile(tpot_ms, 99), 2),
        "in_time_share": round(sum(in_time) / len(ended), 4),
        "cached_share": round(
            sum(one.cached_tokens for one in ended) / sum(one.prompt_tokens for one in ended), 3
        ),
    }
