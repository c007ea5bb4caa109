"""The edge side by side: router and link over a null engine, a bare echo, Ray Serve's proxy, in turn.

All servers are up for the whole run and idle while another is measured; every round measures each of them at
each number of streams.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.closed_loop import run_closed_loop
from bench.edge.child import Child
from bench.edge.flood import Counts, Flood, flowing, watch_flood
from bench.edge.line import Line, NullModel, running_line
from bench.edge.stalled import resident_bytes, stalled_readers
from bench.edge.targets import ECHO, OURS, RAY_SERVE, goals, median_rows, throughput_ratios
from bench.engine import EngineSetup, EngineUnderTest
from bench.record import RequestTimes, percentile, write_results
from bench.rows import SEED, make_workload
from bench.workload import ModelShape

VOCAB_SIZE = 32_000
CONTEXT_TOKENS = 4096
FLOOD, PACED = "flood", "paced"
NUM_STALLED = 64
LIVE_BESIDE_STALLED = 32
TTFT_OUTPUT_TOKENS = 16
TTFT_REQUESTS_PER_STREAM = 8
ECHO_SERVER = "bench.edge.echo_server"
RAY_SERVE_SERVER = "bench.edge.ray_serve_server"
SHAPE = ModelShape(vocab_size=VOCAB_SIZE, context_tokens=CONTEXT_TOKENS)

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
    versions = {}
    async with AsyncExitStack() as stack:
        line = await stack.enter_async_context(
            running_line((plan.flood_model, plan.paced_model), routers=len(OURS))
        )
        systems = _ours(line)
        for name, module in ((ECHO, ECHO_SERVER), (RAY_SERVE, RAY_SERVE_SERVER)):
            if name == RAY_SERVE and not plan.has_ray_serve:
                continue
            child = await stack.enter_async_context(Child(module))
            versions[name] = child.version
            systems.append(System(name=name, addresses=(child.address,), pids=child.pids))
        rows = await _measure_floods(plan, systems)
        stalled = await _measure_stalled(plan, systems[0])
        ttft = await _measure_ttft(plan, line.addresses[0])
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
        systems=versions,
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
    async with flowing(others, Counts(NUM_STALLED)):
        reading = await watch_flood(live, one_router.pids)
    before_bytes = resident_bytes(router)
    async with stalled_readers(others):
        stalled = await watch_flood(live, one_router.pids)
        held_bytes = resident_bytes(router) - before_bytes
    return {
        "readers": NUM_STALLED,
        "live_streams": LIVE_BESIDE_STALLED,
        "mib_per_reader": round(held_bytes / NUM_STALLED / 2**20, 3),
        "live_tok_s_beside_reading": round(reading.tok_s, 1),
        "live_tok_s_beside_stalled": round(stalled.tok_s, 1),
        "share_kept": round(stalled.tok_s / reading.tok_s, 3),
    }


async def _measure_ttft(plan: EdgePlan, address: str) -> list[dict[str, object]]:
    """Of the line and of the engine alone, whose steps take their time, in turn."""
    setup = EngineSetup(
        source="null",
        null=plan.paced_model.plan(()).engine,
        limits=plan.paced_model.plan(()).limits,
    )
    rows = []
    async with EngineUnderTest(setup) as engine:
        for streams in plan.ttft_streams:
            line_ms: list[float] = []
            engine_ms: list[float] = []
            for number in range(plan.rounds):
                workload = make_workload(
                    "mix",
                    SHAPE,
                    streams,
                    TTFT_OUTPUT_TOKENS,
                    SEED + number,
                    requests_per_stream=TTFT_REQUESTS_PER_STREAM,
                )
                line_ms += _ttft_ms((await run_closed_loop(address, PACED, workload)).times)
                engine_ms += _ttft_ms((await engine.run(workload)).times)
            rows.append(_ttft_row(streams, line_ms, engine_ms))
    return rows


def _ttft_ms(times: tuple[RequestTimes, ...]) -> list[float]:
    return [one.ttft_ms for one in times]


def _ttft_row(streams: int, line_ms: list[float], engine_ms: list[float]) -> dict[str, object]:
    line_p50, engine_p50 = statistics.median(line_ms), statistics.median(engine_ms)
    line_p99, engine_p99 = percentile(line_ms, 99), percentile(engine_ms, 99)
    return {
        "streams": streams,
        "requests": len(line_ms),
        "line_ttft_ms_p50": round(line_p50, 3),
        "engine_ttft_ms_p50": round(engine_p50, 3),
        "added_ttft_ms_p50": round(line_p50 - engine_p50, 3),
        "added_ttft_ms_p99": round(line_p99 - engine_p99, 3),
    }


def _show(rows: list[dict[str, object]], title: str) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console.print(table)
