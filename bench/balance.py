"""The balancing policies against each other: simulated replicas in virtual time, the router's own code.

Open loop, Poisson arrivals, the same requests for every policy. `joules_per_output_token` is that of whole
replicas, idle ones included, so leaving one idle shows; `busy_joules_per_output_token` is of steps alone. The
first seconds are warm-up.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from bench.balance_live import measure_live
from bench.record import percentile, write_results
from bench.simulation.sim_replica import ReplicaShape
from bench.simulation.virtual_time import run_virtual
from bench.simulation.world import Told, World
from cluster.balancing.decision import Policy
from cluster.config import Config, parse_config
from cluster.request.completion import Completion, TokenPrompt
from cluster.servers import event_loop
from replicas.config import EngineLimits, NullEngineConfig
from replicas.request import SamplingParams

SEED = 20261122
NUM_REPLICAS = 6
LASTING_S = 8.0
WARM_UP_S = 2.0
VOCAB_SIZE = 32_000
TTFT_MS, TPOT_MS = 500.0, 40.0
NUM_PREFIXES, PREFIX_TOKENS = 12, 512
OUTPUT_TOKENS = 48
LOADS = (0.15, 0.5, 0.8)
"""Of what the replicas can serve when all of them are full."""

# A step of a few milliseconds that grows with the batch, and watts of an H100: 110 idle, 500 at work.
SHAPE = ReplicaShape(
    null=NullEngineConfig(
        step_ms=12.0,
        prefill_tokens_per_s=20_000.0,
        vocab_size=VOCAB_SIZE,
        context_tokens=4096,
        power_w=500.0,
        idle_power_w=110.0,
    ),
    limits=EngineLimits(max_sequences=32, max_waiting=256, step_tokens=512, num_blocks=2048),
    ms_per_sequence=0.3,
)

console = Console()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One policy at one load."""

    policy: str
    load: float
    requests: int
    refused: int
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_p99: float
    in_time_share: float
    output_tok_s: float
    cached_share: float
    busy_joules_per_output_token: float
    joules_per_output_token: float
    awake_replicas: float


def run_balance(models: Sequence[Path], seconds: float, rounds: int, path: Path | None) -> None:
    """On real replicas of each of `models`, and simulated; print the tables and write one file."""
    simulated = [as_row(run_virtual(measure(policy, load))) for load in LOADS for policy in Policy]
    show("balance (simulated)", simulated)
    rows = simulated
    for model in models:
        live = event_loop.run(measure_live(model, seconds, rounds))
        show(f"balance ({model.name}, real replicas)", live)
        rows = rows + live
    console.print(f"written to {write_results('balance', rows, path)}")


def as_row(run: Run) -> dict[str, object]:
    return {"run": "simulated"} | {name: getattr(run, name) for name in Run.__slots__}


def show(title: str, rows: Sequence[dict[str, object]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


async def measure(policy: Policy, load: float) -> Run:
    world = World(make_config(policy), seed=SEED)
    for index in range(NUM_REPLICAS):
        world.add_replica(f"r{index}", SHAPE)
        await asyncio.sleep(0.01)
    told: list[Told] = []
    async with asyncio.TaskGroup() as tasks:
        since_s = world.now_s()
        for at_s, completion in make_requests(load):
            await asyncio.sleep(since_s + at_s - world.now_s())
            record = Told(arrived_s=world.now_s())
            told.append(record)
            tasks.create_task(world.serve(completion, record))
    world.check_idle()
    ended_s = world.now_s()
    await world.close()
    return summarize(policy, load, world, told, since_s=since_s, ended_s=ended_s)


def summarize(
    policy: Policy, load: float, world: World, told: list[Told], *, since_s: float, ended_s: float
) -> Run:
    warm = [one for one in told if one.arrived_s - since_s >= WARM_UP_S]
    done = [one for one in warm if one.completed is not None]
    usages = [one.completed.usage for one in done if one.completed is not None]
    ttft_ms = [one.ttft_s * 1e3 for one in done]
    tpot_ms = [
        (one.last_s - one.first_s) * 1e3 / (len(one.token_ids) - 1)
        for one in done
        if one.first_s is not None and one.last_s is not None and len(one.token_ids) > 1
    ]
    output_tokens = sum(len(one.token_ids) for one in told)
    replicas = world.replicas.values()
    meter_mj = sum(one.meter_mj(until_s=ended_s) for one in replicas)
    in_time = [ttft <= TTFT_MS and tpot <= TPOT_MS for ttft, tpot in zip(ttft_ms, tpot_ms, strict=True)]
    return Run(
        policy=policy.value,
        load=load,
        requests=len(told),
        refused=sum(one.error is not None for one in told),
        ttft_ms_p50=round(percentile(ttft_ms, 50), 1),
        ttft_ms_p99=round(percentile(ttft_ms, 99), 1),
        tpot_ms_p99=round(percentile(tpot_ms, 99), 2),
        in_time_share=round(sum(in_time) / len(warm), 4),
        output_tok_s=round(output_tokens / (ended_s - since_s), 1),
        cached_share=round(
            sum(one.cached_tokens for one in usages) / sum(one.prompt_tokens for one in usages), 3
        ),
        busy_joules_per_output_token=round(sum(one.divided_mj for one in replicas) / 1e3 / output_tokens, 4),
        joules_per_output_token=round(meter_mj / 1e3 / output_tokens, 4),
        awake_replicas=round(sum(one.busy_s for one in replicas) / (ended_s - since_s), 2),
    )


def make_config(policy: Policy) -> Config:
    model = {
        "name": "simulated",
        "source": "null",
        "null_engine": {"vocab_size": VOCAB_SIZE},
        "balancing": policy.value,
        "slo": {"ttft_ms": TTFT_MS, "tpot_ms": TPOT_MS},
    }
    return parse_config({"models": [model]})


def make_requests(load: float) -> Iterator[tuple[float, Completion]]:
    """Half of them begin with one of a few long prefixes; lengths vary. Times are since the first."""
    random = Random(SEED)
    prefixes = [random.choices(range(3, VOCAB_SIZE), k=PREFIX_TOKENS) for _ in range(NUM_PREFIXES)]
    per_s = load * capacity_per_s()
    at_s = 0.0
    while (at_s := at_s + random.expovariate(per_s)) < LASTING_S:
        head = random.choice(prefixes) if random.random() < 0.5 else []
        tail = random.choices(range(3, VOCAB_SIZE), k=round(32 * 8 ** random.random()))
        completion = Completion(
            model="simulated",
            prompt=TokenPrompt(ids=tuple(head + tail)),
            sampling=SamplingParams(),
            max_tokens=max(2, round(random.expovariate(1.0 / OUTPUT_TOKENS))),
            ignore_eos=True,
            energy_wait_ms=0,
        )
        yield at_s, completion


def capacity_per_s() -> float:
    """Requests a second of all replicas: full batches, and the prompts of those that turn over."""
    rows = SHAPE.limits.max_sequences
    prompt_tokens = 0.5 * PREFIX_TOKENS + 32 * 7 / math.log(8)
    step_s = SHAPE.step_s(num_prefill_tokens=0, num_rows=rows)
    request_s = OUTPUT_TOKENS * step_s / rows + prompt_tokens / SHAPE.null.prefill_tokens_per_s
    return NUM_REPLICAS / request_s
