"""The three suites: engine alone, the whole line beside it, and what the edge costs per token."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.table import Table

from bench.closed_loop import LineRun, run_closed_loop
from bench.engine import EngineSetup, EngineUnderTest
from bench.record import summarize, write_results
from bench.rows import SEED, checkpoint_shape, energy_fields, identity, make_workload, wattline_version
from bench.workload import Case, ModelShape, Workload
from cluster.config import Config, EnergySection, ModelSection, load_config
from replicas.energy.cpu_model import CpuModelMeter

if TYPE_CHECKING:
    from cluster.serving.stack import Stack

WARM_UP_OUTPUT_TOKENS = 8
NULL_VOCAB_SIZE = 32_000
COLUMNS = (
    "system",
    "model",
    "kernels",
    "workload",
    "concurrency",
    "output_tok_s",
    "ttft_ms_p50",
    "tpot_ms_p50",
    "joules_per_output_token",
)

ENERGY = EnergySection()

console = Console()


async def run_engine_suite(
    setups: Sequence[EngineSetup],
    cases: Sequence[Case],
    output_tokens: int,
    path: Path | None,
) -> None:
    """Measure each engine on each case and write one file."""
    rows: list[dict[str, object]] = []
    for setup in setups:
        rows += await measure_engine(Path(setup.source).name, setup, cases, output_tokens)
    finish("engine", rows, path)


async def run_line_suite(
    config_path: Path, concurrencies: Sequence[int], output_tokens: int, path: Path | None
) -> None:
    """Measure the line of every model, then the same engines alone, in one run."""
    config = load_config(config_path)
    rows: list[dict[str, object]] = []
    with serving(config) as stack:
        for section in config.models:
            for concurrency in concurrencies:
                workload = make_workload("mix", shape_of(section), concurrency, output_tokens)
                rows.append(await measure_line(stack, section, workload))
    for section in config.models:
        setup = EngineSetup(
            source=section.source,
            tensor=section.parallel.tensor,
            expert=section.parallel.expert,
            layout=section.parallel.layout,
            threads=section.threads_per_rank,
            dtype=section.dtype,
            kernels=section.kernels,
            quantization=section.quantization,
        )
        cases = [Case(workload="mix", concurrency=concurrency) for concurrency in concurrencies]
        rows += await measure_engine(section.name, setup, cases, output_tokens)
    add_line_share(rows)
    finish("line", rows, path)


async def run_edge_suite(
    concurrencies: Sequence[int], output_tokens: int, step_ms: float, path: Path | None
) -> None:
    """CPU microseconds per streamed token of router, supervisor and ranks, over a null engine."""
    section = ModelSection.model_validate(
        {
            "name": "null",
            "source": "null",
            "null_engine": {"step_ms": step_ms, "vocab_size": NULL_VOCAB_SIZE, "prefill_tokens_per_s": 1e9},
            "limits": {"max_sequences": max(concurrencies), "step_tokens": 2048},
        }
    )
    rows: list[dict[str, object]] = []
    with serving(Config.model_validate({"models": [section]})) as stack:
        for concurrency in concurrencies:
            workload = make_workload("mix", shape_of(section), concurrency, output_tokens)
            before = cpu_seconds(stack)
            row = await measure_line(stack, section, workload, warm_up=False)
            after = cpu_seconds(stack)
            tokens = len(workload.prompts) * output_tokens
            row |= {
                f"{role}_cpu_us_per_token": round((after[role] - before[role]) * 1e6 / tokens, 2)
                for role in after
            }
            rows.append(row)
    finish("edge", rows, path)


async def measure_engine(
    name: str,
    setup: EngineSetup,
    cases: Sequence[Case],
    output_tokens: int,
) -> list[dict[str, object]]:
    """Rows of one engine; joules are the CPU estimate over its rank processes."""
    rows = []
    async with EngineUnderTest(setup) as engine:
        assert engine.ready is not None
        meter = CpuModelMeter(
            pids=[process.pid for process in engine.processes],
            static_w=ENERGY.cpu_static_w,
            core_w=ENERGY.cpu_core_w,
        )
        shape = ModelShape(vocab_size=engine.ready.vocab_size, context_tokens=engine.ready.context_tokens)
        for case in cases:
            kind, concurrency = case.workload, case.concurrency
            workload = make_workload(kind, shape, concurrency, output_tokens)
            # Another seed: a prefix cache must carry nothing over.
            await engine.run(make_workload(kind, shape, concurrency, WARM_UP_OUTPUT_TOKENS, SEED + 1))
            before = meter.read()
            run = await engine.run(workload)
            after = meter.read()
            rows.append(
                identity("wattline-engine", wattline_version(), name, setup.dtype, workload)
                | summarize(run.times, wall_s=run.wall_s, prompt_tokens=workload.prompt_tokens)
                | energy_fields((after.energy_mj - before.energy_mj) / 1e3, after.source.value, workload)
                | {"tensor_parallel": setup.tensor, "expert_parallel": setup.expert, "layout": setup.layout}
                | {"threads_per_rank": setup.threads, "kernels": engine.ready.kernels}
                | {"quantization": engine.ready.quantization}
                | {"load_average": round(os.getloadavg()[0], 2)}
            )
            show(rows[-1])
    return rows


async def measure_line(
    stack: Stack, section: ModelSection, workload: Workload, *, warm_up: bool = True
) -> dict[str, object]:
    """One row of the whole line, as its gRPC clients see it."""
    address = stack.addresses.grpc
    if warm_up:
        short = make_workload("mix", shape_of(section), workload.concurrency, WARM_UP_OUTPUT_TOKENS)
        await run_closed_loop(address, section.name, short)
    run: LineRun = await run_closed_loop(address, section.name, workload)
    row = (
        identity("wattline-line", wattline_version(), section.name, section.dtype, workload)
        | summarize(run.times, wall_s=run.wall_s, prompt_tokens=workload.prompt_tokens)
        | energy_fields(run.energy_j, run.energy_source, workload)
        | {"tensor_parallel": section.parallel.tensor, "expert_parallel": section.parallel.expert}
        | {"energy_final_share": round(run.energy_final_share, 3)}
    )
    show(row)
    return row


def add_line_share(rows: list[dict[str, object]]) -> None:
    """Add to each line row its throughput as a share of the engine's own, from the same run."""
    engines = {
        (row["model"], row["concurrency"]): row["output_tok_s"]
        for row in rows
        if row["system"] == "wattline-engine"
    }
    for row in rows:
        if row["system"] == "wattline-line":
            line, engine = row["output_tok_s"], engines[row["model"], row["concurrency"]]
            assert isinstance(line, float)
            assert isinstance(engine, float)
            row["share_of_engine"] = round(line / engine, 3)


@contextmanager
def serving(config: Config) -> Iterator[Stack]:
    """The models of `config` behind a router on free ports, in a scratch folder, until the block ends."""
    from cluster.commands.running import running_stack

    with tempfile.TemporaryDirectory(prefix="wlb-") as folder:
        free = config.router.model_copy(update={"grpc_port": 0, "http_port": 0, "link_port": 0})
        quiet = config.model_copy(update={"router": free, "runtime_dir": folder})
        with running_stack(quiet, console) as (stack, _interrupts):
            yield stack


def shape_of(section: ModelSection) -> ModelShape:
    """Of a null model or of a checkpoint folder."""
    if section.is_null:
        null = section.null_engine
        return ModelShape(vocab_size=null.vocab_size, context_tokens=null.context_tokens)
    return checkpoint_shape(Path(section.source))


def cpu_seconds(stack: Stack) -> dict[str, float]:
    """CPU time so far of the router, the supervisors and the ranks."""
    state = stack.status()
    assert state is not None
    replicas = [replica for model in state.models for replica in model.replicas]
    router = [
        one
        for one in psutil.Process().children(recursive=True)
        if "cluster.router" in " ".join(one.cmdline())
    ]
    return {
        "router": sum(cpu_of(one.pid) for one in router),
        "supervisor": sum(cpu_of(replica.supervisor_pid) for replica in replicas),
        "ranks": sum(cpu_of(rank.pid) for replica in replicas for rank in replica.ranks),
    }


def cpu_of(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def show(row: dict[str, object]) -> None:
    console.print("  ".join(f"{key} [bold]{row[key]}[/]" for key in COLUMNS if key in row), highlight=False)


def finish(name: str, rows: list[dict[str, object]], path: Path | None) -> None:
    """Print the table and write the file."""
    extra = sorted(
        {key for row in rows for key in row if key.endswith(("_per_token", "share_of_engine"))} - {*COLUMNS}
    )
    table = Table(title=name)
    for column in (*COLUMNS, *extra):
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in (*COLUMNS, *extra)))
    console.print(table)
    console.print(f"written to {write_results(name, rows, path)}")
