"""What happens at several times the load there is room for: simulated exactly, then real, with null engines.

Goodput is the tokens a second of answers that kept the objective. Refusals are timed from the request to its
status. The real run is a router process, two null-engine replicas and open-loop clients over gRPC; capacity
is what their rows can serve. What the router measured of the same requests, and how late the clients' own
event loop was, stand beside what clients saw: the difference is the machine's.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
import time
import urllib.request
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

from bench.priority import share_priority
from bench.record import percentile, write_results
from bench.simulation.sim_replica import ReplicaShape
from bench.simulation.virtual_time import run_virtual
from bench.simulation.world import Told, World
from cluster.config import parse_config
from cluster.request.completion import Completion, TokenPrompt
from cluster.security.api_keys import make_key
from cluster.servers import event_loop
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
LAG_EVERY_S = 0.005
REFUSAL_BUCKET = re.compile(r'wattline_refusal_seconds_bucket\{le="(?P<edge>[^"]+)",.*\} (?P<count>\S+)')
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
    """One request as its client saw it. `ttft_ms` None: it was refused after `told_ms`.

    `router_ttft_ms` is the time to the first token as the router measured it.
    """

    tenant: str
    told_ms: float
    ttft_ms: float | None
    output_tokens: int
    router_ttft_ms: float | None = None


def run_overload(seconds: float, path: Path | None) -> None:
    """Both runs; print the table and write one file."""
    rows = [run_virtual(simulate(load)) for load in LOADS]
    rows += event_loop.run(measure_real(seconds))
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
    async with serving() as served, grpc.aio.insecure_channel(served.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        await send(stub, make_request(0), "flood", served.keys)
        for load in LOADS:
            before_mib, before = served.router_mib(), await served.refusals()
            ended, lag_ms = await offer(stub, load, seconds, served.keys)
            refused_ms = [one.told_ms for one in ended if one.ttft_ms is None]
            row = {"run": "real", "load": load} | summarize(ended, seconds)
            row["router_ttft_ms_p99"] = round(
                percentile([one.router_ttft_ms for one in ended if one.router_ttft_ms is not None], 99), 1
            )
            row["refusal_ms_p99"] = round(percentile(refused_ms, 99), 1) if refused_ms else None
            row["router_refusal_ms_p99_below"] = percentile_below_ms(before, await served.refusals())
            row["client_lag_ms_p99"] = round(percentile(lag_ms, 99), 1)
            row["router_mib_before"] = round(before_mib, 1)
            row["router_mib_after"] = round(served.router_mib(), 1)
            rows.append(row)
    return rows


async def offer(
    stub: pb_grpc.InferenceAsyncStub, load: float, seconds: float, keys: dict[str, str]
) -> tuple[list[Ended], list[float]]:
    """What became of all requests, and by how much this process's own loop was late, in ms.

    Requests are made before the first is due: making them would delay the reading of answers.
    """
    requests = [
        (at_s, tenant, make_request(number)) for number, (at_s, tenant) in enumerate(arrivals(load, seconds))
    ]
    lag_ms: list[float] = []
    watching = asyncio.create_task(watch_lag(lag_ms))
    since_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        sent = []
        for at_s, tenant, request in requests:
            await asyncio.sleep(max(0.0, since_s + at_s - time.perf_counter()))
            sent.append(tasks.create_task(send(stub, request, tenant, keys)))
    watching.cancel()
    return [one.result() for one in sent], lag_ms


async def watch_lag(lag_ms: list[float]) -> None:
    while True:
        since_s = time.perf_counter()
        await asyncio.sleep(LAG_EVERY_S)
        lag_ms.append((time.perf_counter() - since_s - LAG_EVERY_S) * 1e3)


def make_request(number: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="null",
        tokens=pb.TokenIds(ids=make_prompt(number)),
        sampling=pb.Sampling(temperature=0.0),
        limits=pb.Limits(max_tokens=answer_tokens(number), ignore_eos=True),
        energy_wait_ms=0,
    )


async def send(
    stub: pb_grpc.InferenceAsyncStub, request: pb.GenerateRequest, tenant: str, keys: dict[str, str]
) -> Ended:
    since_s = time.perf_counter()
    first_s, router_ttft_ms, output_tokens = None, None, 0
    try:
        async for response in stub.Generate(request, metadata=(("x-api-key", keys[tenant]),)):
            if response.delta.token_ids:
                first_s = first_s or time.perf_counter()
                output_tokens += len(response.delta.token_ids)
            if response.HasField("final"):
                router_ttft_ms = response.final.timing.ttft_ms
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
    return Ended(
        tenant=tenant,
        told_ms=(time.perf_counter() - since_s) * 1e3,
        ttft_ms=None if first_s is None else (first_s - since_s) * 1e3,
        output_tokens=output_tokens,
        router_ttft_ms=router_ttft_ms,
    )


def percentile_below_ms(before: dict[float, float], after: dict[float, float]) -> float | None:
    """The upper edge of the bucket with the 99th percentile of what came between; None: nothing did."""
    counts = {edge: count - before.get(edge, 0.0) for edge, count in after.items()}
    total = counts.get(float("inf"), 0.0)
    if total == 0.0:
        return None
    return min(edge for edge, count in counts.items() if count >= 0.99 * total) * 1e3


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A router process, seen from outside. `keys` are the API keys of the tenants."""

    grpc: str
    http: str
    keys: dict[str, str]
    process: psutil.Process

    def router_mib(self) -> float:
        return float(self.process.memory_info().rss) / 2**20

    async def refusals(self) -> dict[float, float]:
        """How many were refused within so many seconds, as the router measured it."""
        page = await asyncio.to_thread(_read_page, f"http://{self.http}/metrics")
        found = (REFUSAL_BUCKET.match(line) for line in page.splitlines())
        return {float(one["edge"]): float(one["count"]) for one in found if one is not None}


def _read_page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=READY_S) as response:
        text: str = response.read().decode()
    return text


@asynccontextmanager
async def serving() -> AsyncIterator[Served]:
    """A router process and the replicas that dial it."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wlb-")))
        made = {str(one["name"]): make_key(str(one["name"])) for one in TENANTS}
        keys_file, config, told = folder / "keys", folder / "wattline.yaml", folder / "router.json"
        keys_file.write_text("".join(f"{key.line}\n" for _, key in made.values()))
        auth = {"keys_file": str(keys_file), "protect_pages": False}
        router = {"grpc_port": 0, "http_port": 0, "link_port": 0, "auth": auth}
        tenants = {"tenants": TENANTS, "ledger": {"enabled": False}}
        config.write_text(json.dumps({"models": [MODEL], "router": router} | tenants))
        arguments = ("-m", "cluster.edge", "--config", str(config), "--addresses", str(told))
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments)
        stack.push_async_callback(process.wait)
        stack.callback(process.terminate)
        async with asyncio.timeout(READY_S):
            while not told.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        addresses = json.loads(told.read_text())
        for index in range(NUM_REPLICAS):
            replica = await start_replica(folder, f"r{index}", addresses["link"])
            stack.push_async_callback(replica.stop)
        yield Served(
            grpc=addresses["grpc"],
            http=addresses["http"],
            keys={name: key for name, (key, _) in made.items()},
            process=psutil.Process(process.pid),
        )


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
    for child in psutil.Process().children(recursive=True):
        share_priority(child.pid)
    return supervisor
