"""The edge side by side: router and link over a null engine, bare echo and relay, Ray Serve's proxy, in turn.

All servers are up for the whole run and idle while another is measured; every round measures each of them at
each number of streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from bench.edge.child import Child
from bench.edge.first_tokens import (
    OUTPUT_TOKENS,
    EngineCallers,
    Question,
    ask_over_grpc,
    draw_questions,
    time_questions,
    ttft_row,
)
from bench.edge.flood import Counts, Flood, flowing, until_calm, watch_flood
from bench.edge.line import Line, NullModel, running_line
from bench.edge.stalled import StalledRound, resident_bytes, stalled_readers, stalled_row
from bench.edge.targets import ECHO, OURS, RAY_SERVE, RELAY, goals, median_rows, throughput_ratios
from bench.engine import EngineSetup, EngineUnderTest
from bench.record import write_results
from bench.rows import SEED
from protos import wattline_inference_pb2_grpc as pb_grpc

VOCAB_SIZE = 32_000
CONTEXT_TOKENS = 4096
FLOOD, PACED = "flood", "paced"
NUM_STALLED = 64
LIVE_BESIDE_STALLED = 32
WARM_UP = Question(number=2**32, prompt_ids=(VOCAB_SIZE - 1,), thinking_s=0.0)
"""Asked untimed: a channel connects at its first call, and the engine's socket is open before."""
ECHO_SERVER = "bench.edge.echo_server"
RELAY_SERVER = "bench.edge.relay_server"
RAY_SERVE_SERVER = "bench.edge.ray_serve_server"

console = Console()


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgePlan:
    """`ttft_streams` are those of the paced engine, whose step takes `step_ms`."""

    streams: tuple[int, ...]
    ttft_streams: tuple[int, ...]
    rounds: int
    window_s: float
    step_ms: float
    has_ray_serve: bool

    @property
    def flood_model(self) -> NullModel:
        return self._model(FLOOD, 0.0, max(*self.streams, NUM_STALLED + LIVE_BESIDE_STALLED))

    @property
    def paced_model(self) -> NullModel:
        return self._model(PACED, self.step_ms, max(self.ttft_streams))

    def _model(self, name: str, step_ms: float, streams: int) -> NullModel:
        return NullModel(
            name=name,
            step_ms=step_ms,
            streams=streams,
            vocab_size=VOCAB_SIZE,
            context_tokens=CONTEXT_TOKENS,
        )

    def flood(self, addresses: tuple[str, ...], streams: int) -> Flood:
        return Flood(
            addresses=addresses,
            model=FLOOD,
            streams=streams,
            output_tokens=CONTEXT_TOKENS - 16,
            window_s=self.window_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Where a system listens, and its processes by role."""

    name: str
    addresses: tuple[str, ...]
    pids: Mapping[str, int]


async def run_edge_suite(plan: EdgePlan, path: Path | None) -> None:
    """Measure all, print the ratios and write one file."""
    async with AsyncExitStack() as stack:
        line = await stack.enter_async_context(
            running_line((plan.flood_model, plan.paced_model), routers=len(OURS))
        )
        echo = await stack.enter_async_context(Child(ECHO_SERVER))
        others = {ECHO: echo, RELAY: await stack.enter_async_context(Child(RELAY_SERVER, (echo.address,)))}
        if plan.has_ray_serve:
            others[RAY_SERVE] = await stack.enter_async_context(Child(RAY_SERVE_SERVER))
        systems = _ours(line) + [
            System(name=name, addresses=(child.address,), pids=child.pids) for name, child in others.items()
        ]
        rows = await _measure_floods(plan, systems)
        stalled = await _measure_stalled(plan, systems[0])
        ttft = await _measure_ttft(plan, line, {name: others[name].address for name in (ECHO, RELAY)})
    medians, ratios = median_rows(rows), throughput_ratios(rows)
    reached = goals(ratios, medians, ttft, stalled)
    _show(medians, "tokens/s")
    _show(ratios, "over the others")
    _show(ttft, "time to first token")
    _show([stalled], "stalled readers")
    _show(reached, "goals")
    written = write_results(
        "edge",
        medians,
        path,
        systems={name: child.version for name, child in others.items()},
        ratios=ratios,
        ttft=ttft,
        stalled_readers=stalled,
        goals=reached,
        rounds=rows,
    )
    console.print(f"written to {written}")


def _ours(line: Line) -> list[System]:
    """One router, and as many as there are, over the same replica."""
    routers = list(line.router_pids.items())
    return [
        System(
            name=name,
            addresses=line.addresses[: index + 1],
            pids=dict(routers[: index + 1]) | dict(line.replica_pids[FLOOD]),
        )
        for index, name in enumerate(OURS)
    ]


async def _measure_floods(plan: EdgePlan, systems: list[System]) -> list[dict[str, object]]:
    rows = []
    for _ in range(plan.rounds):
        for streams in plan.streams:
            for system in systems:
                watched = await watch_flood(plan.flood(system.addresses, streams), system.pids)
                await until_calm(system.pids)
                rows.append({"system": system.name} | watched.row())
                console.print(rows[-1])
    return rows


async def _measure_stalled(plan: EdgePlan, one_router: System) -> dict[str, object]:
    """Live streams beside others that read, then beside as many that do not; and what the router holds.

    The engine computes for all of them alike, so what the live ones lose is due to the router.
    """
    live = plan.flood(one_router.addresses, LIVE_BESIDE_STALLED)
    others = plan.flood(one_router.addresses, NUM_STALLED)
    router = one_router.pids["router-0"]
    rounds = []
    for _ in range(plan.rounds):
        async with flowing(others, Counts(NUM_STALLED)):
            reading = await watch_flood(live, one_router.pids)
        before_bytes = resident_bytes(router)
        async with stalled_readers(others):
            stalled = await watch_flood(live, one_router.pids)
            held_bytes = resident_bytes(router) - before_bytes
        rounds.append(
            StalledRound(reading_tok_s=reading.tok_s, stalled_tok_s=stalled.tok_s, held_bytes=held_bytes)
        )
    return {"live_streams": LIVE_BESIDE_STALLED, **stalled_row(rounds, readers=NUM_STALLED)}


async def _measure_ttft(plan: EdgePlan, line: Line, bare: Mapping[str, str]) -> list[dict[str, object]]:
    """Of the line, of the engine alone, whose steps take their time, and of bare gRPC at `bare`, in turn."""
    replica = plan.paced_model.plan(())
    rows = []
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(
            EngineUnderTest(EngineSetup(source="null", null=replica.engine, limits=replica.limits))
        )
        asks = {
            "engine_ms": (await stack.enter_async_context(EngineCallers(engine))).ask,
            "line_ms": ask_over_grpc(await _stub(line.addresses[0], stack), PACED),
        } | {
            f"{name}_ms": ask_over_grpc(await _stub(address, stack), PACED) for name, address in bare.items()
        }
        for ask in asks.values():
            await ask(WARM_UP)
        for callers in plan.ttft_streams:
            waits_ms: dict[str, list[float]] = {name: [] for name in asks}
            for number in range(plan.rounds):
                questions = draw_questions(
                    callers=callers,
                    seed=SEED + number,
                    vocab_size=VOCAB_SIZE,
                    answer_s=OUTPUT_TOKENS * plan.step_ms / 1e3,
                )
                for name, ask in asks.items():
                    waits_ms[name] += await time_questions(questions, ask)
            rows.append(ttft_row(callers, **waits_ms))
            console.print(rows[-1])
    return rows


async def _stub(address: str, stack: AsyncExitStack) -> pb_grpc.InferenceAsyncStub:
    return pb_grpc.InferenceStub(await stack.enter_async_context(grpc.aio.insecure_channel(address)))


def _show(rows: list[dict[str, object]], title: str) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console.print(table)
