"""Our edge without Ray: router processes, and replicas of the null engine that dial them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.edge.child import Child
from bench.edge.null_replica import ReplicaPlan
from bench.priority import share_priority
from cluster.addresses import RouterAddresses, read_addresses

READY_TIMEOUT_S = 120.0
POLL_S = 0.05
STOP_TIMEOUT_S = 10.0
FREE_PORTS = {"grpc_port": 0, "http_port": 0, "link_port": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class NullModel:
    """A model of the null engine, and how many streams of `context_tokens` it holds at once."""

    name: str
    step_ms: float
    streams: int
    vocab_size: int
    context_tokens: int

    def section(self) -> dict[str, object]:
        """Its part of wattline.yaml."""
        return {
            "name": self.name,
            "source": "null",
            "null_engine": {"vocab_size": self.vocab_size, "context_tokens": self.context_tokens},
            "limits": {"max_sequences": self.streams, "max_output_tokens": self.context_tokens},
        }

    def plan(self, links: tuple[str, ...]) -> ReplicaPlan:
        return ReplicaPlan(
            model=self.name,
            routers=links,
            step_ms=self.step_ms,
            streams=self.streams,
            vocab_size=self.vocab_size,
            context_tokens=self.context_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """gRPC addresses of the routers, and the pids of all: `router-0`, ..., and by model of its replica."""

    addresses: tuple[str, ...]
    router_pids: Mapping[str, int]
    replica_pids: Mapping[str, Mapping[str, int]]


@asynccontextmanager
async def running_line(models: tuple[NullModel, ...], *, routers: int) -> AsyncIterator[Line]:
    """One replica of each model, attached to every router. Raises ServerFailed or TimeoutError."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wlb-")))
        config = folder / "wattline.yaml"
        config.write_text(json.dumps({"models": [model.section() for model in models], "router": FREE_PORTS}))
        told = [
            await stack.enter_async_context(_router(config, folder / f"router-{index}.json"))
            for index in range(routers)
        ]
        links = tuple(one.link for one in told)
        replica_pids = {}
        for model in models:
            plan = json.dumps(asdict(model.plan(links)))
            listening = await stack.enter_async_context(Child("bench.edge.null_replica", (plan,)))
            replica_pids[model.name] = listening.pids
        yield Line(
            addresses=tuple(one.grpc for one in told),
            router_pids={f"router-{index}": one.pid for index, one in enumerate(told)},
            replica_pids=replica_pids,
        )


@asynccontextmanager
async def _router(config: Path, told: Path) -> AsyncIterator[RouterAddresses]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "replicas.rank.launch", str(os.getpid()), "cluster.edge"),
        *("--config", str(config), "--addresses", str(told)),
        start_new_session=True,
    )
    share_priority(process.pid)
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not told.exists():  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        yield read_addresses(told)
    finally:
        process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
