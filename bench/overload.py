"""What happens at several times the load there is room for: simulated exactly, then real, with null engines.

Goodput is the tokens a second of answers that kept the objective. Refusals are timed from the request to its
status. The real run is a router process, two null-engine replicas and open-loop clients over gRPC; capacity
is what their rows can serve.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import grpc
import psutil
from rich.console import Console
from rich.table import Table

from bench.record import percentile, write_results
from bench.simulation.sim_replica import ReplicaShape
from bench.simulation.virtual_time import run_virtual
from bench.simulation.world import Told, World
from cluster.config import parse_config
from cluster.router.completion import Completion, TokenPrompt
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc
from replicas.config import EngineLimits, NullEngineConfig, ReplicaConfig
from replicas.request import SamplingParams
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor

SEED = 20261122
LOADS = (0.5, 1.0, 2.0, 5.0)
TTFT_MS = 500.0
NUM_REPLICAS = 2
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64
SIMULATED_S = 12.0
SMALL_SHARE = 0.1
"""Of the arrivals: those of the small tenant; the rest is one flood of another."""
VOCAB_SIZE = 32_000
READY_S = 60.0
NULL = NullEngineConfig(step_ms=20.0, prefill_tokens_per_s=20_000.0, vocab_size=VOCAB_SIZE)
LIMITS = EngineLimits(max_sequences=16, max_waiting=64, num_blocks=1024)
MODEL: dict[str, Any] = {
    "name": "null",
    "source": "null",
    "null_engine": {"vocab_size": VOCAB_SIZE},
    "slo": {"ttft_ms": TTFT_MS},
    "limits": {"max_sequences": LIMITS.max_sequences},
}
TENANTS = [{"name": "flood"}, {"name": "small"}]

console = Console()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One request as its client saw it. `ttft_ms` None: it was refused after `told_ms`."""

    tenant: str
    told_ms: float
    ttft_ms: float | None
    output_tokens: int


def run_overload(seconds: float, path: Path | None) -> None:
    """Both runs; print the table and write one file."""
    rows = [run_virtual(simulate(load)) for load in LOADS]
    rows += asyncio.run(measure_real(seconds))
    for row in rows:
        peers = [one for one in rows if one["run"] == row["run"]]
        peak = max(float(str(one["goodput_tok_s"])) for one in peers)
        row["goodput_share_of_peak"] = round(float(str(row["goodput_tok_s"])) / peak, 3) if peak else 0.0
    table = Table(title="overload")
    for column in rows[-1]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in rows[-1]))
    console.print(table)
    console.print(f"written to {write_results('overload', rows, path)}")


def capacity_per_s() -> float:
    """Requests a second that the rows of all replicas can serve."""
    step_s = NULL.step_ms / 1e3
    request_s = OUTPUT_TOKENS * step_s / LIMITS.max_sequences + PROMPT_TOKENS / NULL.prefill_tokens_per_s
    return NUM_REPLICAS / request_s


def arrivals(load: float, seconds: float) -> list[tuple[float, str]]:
    """Times since the first, and whose it is: the same for every run of a load."""
    random, at_s = Random(f"{SEED}-{load}"), 0.0
    found = []
    while (at_s := at_s + random.expovariate(load * capacity_per_s())) < seconds:
        found.append((at_s, "small" if random.random() < SMALL_SHARE else "flood"))
    return found


async def simulate(load: float) -> dict[str, object]:
    """In virtual time: a status takes none, so what refusals took is not said."""
    world = World(parse_config({"models": [MODEL], "tenants": TENANTS}), seed=SEED)
    for index in range(NUM_REPLICAS):
        world.add_replica(f"r{index}", ReplicaShape(null=NULL, limits=LIMITS))
    told: list[tuple[str, Told]] = []
    async with asyncio.TaskGroup() as tasks:
        for number, (at_s, tenant) in enumerate(arrivals(load, SIMULATED_S)):
            await asyncio.sleep(at_s - world.now_s())
            record = Told(arrived_s=world.now_s())
            told.append((tenant, record))
            tasks.create_task(world.serve(make_completion(number), record, tenant=tenant))
    world.check_idle()
    await world.close()
    ended = [
        Ended(
            tenant=tenant,
            told_ms=0.0,
            ttft_ms=one.ttft_s * 1e3 if one.first_s is not None else None,
            output_tokens=len(one.token_ids),
        )
        for tenant, one in told
    ]
    return {"run": "simulated", "load": load} | summarize(ended, SIMULATED_S)


def make_completion(number: int) -> Completion:
    return Completion(
        model="null",
        prompt=TokenPrompt(ids=make_prompt(number)),
        sampling=SamplingParams(),
        max_tokens=answer_tokens(number),
        ignore_eos=True,
        energy_wait_ms=0,
    )


def answer_tokens(number: int) -> int:
    """Of every length, many short and a few long."""
    return max(1, min(8 * OUTPUT_TOKENS, round(Random(-number).expovariate(1.0 / OUTPUT_TOKENS))))


def make_prompt(number: int) -> tuple[int, ...]:
    return tuple(Random(number).choices(range(3, VOCAB_SIZE), k=PROMPT_TOKENS))


async def measure_real(seconds: float) -> list[dict[str, object]]:
    """All loads on one router and its replicas, one after another."""
    rows = []
    async with serving() as (address, router), grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        await send(stub, 0, "flood")
        for load in LOADS:
            before_mib = router.memory_info().rss / 2**20
            since_s = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                sent = []
                for number, (at_s, tenant) in enumerate(arrivals(load, seconds)):
                    await asyncio.sleep(max(0.0, since_s + at_s - time.perf_counter()))
                    sent.append(tasks.create_task(send(stub, number, tenant)))
            row = {"run": "real", "load": load} | summarize([one.result() for one in sent], seconds)
            refused = [one.result().told_ms for one in sent if one.result().ttft_ms is None]
            row["refusal_ms_p99"] = round(percentile(refused, 99), 1) if refused else None
            row["router_mib_before"] = round(before_mib, 1)
            row["router_mib_after"] = round(router.memory_info().rss / 2**20, 1)
            rows.append(row)
    return rows


async def send(stub: pb_grpc.InferenceAsyncStub, number: int, tenant: str) -> Ended:
    """Tenants are told apart by their API keys, which this router does not ask for: all are one."""
    request = pb.GenerateRequest(
        model="null",
        tokens=pb.TokenIds(ids=make_prompt(number)),
        sampling=pb.Sampling(temperature=0.0),
        limits=pb.Limits(max_tokens=answer_tokens(number), ignore_eos=True),
        energy_wait_ms=0,
    )
    since_s = time.perf_counter()
    first_s, output_tokens = None, 0
    try:
        async for response in stub.Generate(request):
            if response.delta.token_ids:
                first_s = first_s or time.perf_counter()
                output_tokens += len(response.delta.token_ids)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
    return Ended(
        tenant=tenant,
        told_ms=(time.perf_counter() - since_s) * 1e3,
        ttft_ms=None if first_s is None else (first_s - since_s) * 1e3,
        output_tokens=output_tokens,
    )


def summarize(ended: list[Ended], seconds: float) -> dict[str, object]:
    """`small_served` and `flood_served` are the shares of each tenant's requests that were admitted."""
    ttft_ms = [one.ttft_ms for one in ended if one.ttft_ms is not None]
    good = sum(one.output_tokens for one in ended if one.ttft_ms is not None and one.ttft_ms <= TTFT_MS)

    def served(tenant: str) -> float:
        own = [one for one in ended if one.tenant == tenant]
        return round(sum(one.ttft_ms is not None for one in own) / max(1, len(own)), 3)

    return {
        "requests": len(ended),
        "admitted": len(ttft_ms),
        "goodput_tok_s": round(good / seconds, 1),
        "admitted_ttft_ms_p50": round(percentile(ttft_ms, 50), 1),
        "admitted_ttft_ms_p99": round(percentile(ttft_ms, 99), 1),
        "small_served": served("small"),
        "flood_served": served("flood"),
    }


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[str, psutil.Process]]:
    """A router process and the replicas that dial it; yields the router's gRPC address."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wlb-")))
        ports = {"grpc_port": 0, "http_port": 0, "link_port": 0}
        config, told = folder / "wattline.yaml", folder / "router.json"
        config.write_text(json.dumps({"models": [MODEL], "router": ports}))
        arguments = ("-m", "cluster.router", "--config", str(config), "--addresses", str(told))
        router = await asyncio.create_subprocess_exec(sys.executable, *arguments)
        stack.push_async_callback(router.wait)
        stack.callback(router.terminate)
        async with asyncio.timeout(READY_S):
            while not told.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        addresses = json.loads(told.read_text())
        for index in range(NUM_REPLICAS):
            replica = await start_replica(folder, f"r{index}", addresses["link"])
            stack.push_async_callback(replica.stop)
        yield addresses["grpc"], psutil.Process(router.pid)


async def start_replica(folder: Path, name: str, link: str) -> Supervisor:
    replica = ReplicaConfig(
        model="null",
        source="null",
        replica_id=name,
        routers=(link,),
        limits=LIMITS,
        null=NULL,
        runtime_dir=str(folder / name),
        ready_timeout_s=READY_S,
    )
    ranks = SubprocessRankGroup(runtime_dir=Path(replica.runtime_dir))
    supervisor = Supervisor(replica, ranks, lambda _: None)
    await supervisor.start()
    return supervisor
