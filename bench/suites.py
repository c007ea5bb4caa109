"""The engine alone, and the whole line beside it."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bench.closed_loop import LineRun, run_closed_loop
from bench.edge.child import Child
from bench.engine import EngineSetup, EngineUnderTest
from bench.priority import share_priority_below
from bench.record import percentile, summarize, write_results
from bench.rows import SEED, checkpoint_shape, energy_fields, identity, make_workload, wattline_version
from bench.workload import Case, ModelShape, Workload
from cluster.config import Config, EnergySection, ModelSection
from replicas.energy.cpu_model import CpuModelMeter

if TYPE_CHECKING:
    from cluster.serving.stack import Stack

WARM_UP_OUTPUT_TOKENS = 8
LINE, ENGINE, BARE = "wattline-line", "wattline-engine", "bare-grpc"
BARE_SERVER = "bench.bare_server"
COLUMNS = (
    "system",
    "model",
    "split",
    "kernels",
    "workload",
    "concurrency",
    "output_tok_s",
    "ttft_ms_p50",
    "tpot_ms_p50",
    "joules_per_output_token",
    "energy_final_ms_p99",
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
    config: Config, concurrencies: Sequence[int], output_tokens: int, rounds: int, path: Path | None
) -> None:
    """Measure the line of every model, its engine alone and behind a bare server, in turn, in one run."""
    rows: list[dict[str, object]] = []
    with serving(config) as stack:
        for section in config.models:
            async with (
                EngineUnderTest(setup_of(section)) as engine,
                Child(BARE_SERVER, (section.model_dump_json(),)) as bare,
            ):
                for number in range(rounds):
                    for concurrency in concurrencies:
                        workload = make_workload(
                            "mix", shape_of(section), concurrency, output_tokens, SEED + 2 * number
                        )
                        rows.append(await measure_line(LINE, stack.addresses.grpc, section, workload))
                        rows.append(await measure_case(engine, section.name, workload))
                        rows.append(await measure_line(BARE, bare.address, section, workload))
    finish("line", rows, path, shares=line_shares(rows))


def with_threads(config: Config, threads: int) -> Config:
    """The same models with so many threads for each of their ranks; 0: as they are."""
    update = {"threads_per_rank": threads} if threads else {}
    return config.model_copy(update={"models": tuple(one.model_copy(update=update) for one in config.models)})


def setup_of(section: ModelSection) -> EngineSetup:
    return EngineSetup(
        source=section.source,
        tensor=section.parallel.tensor,
        expert=section.parallel.expert,
        layout=section.parallel.layout,
        threads=section.threads_per_rank,
        dtype=section.dtype,
        kernels=section.kernels,
        quantization=section.quantization,
        limits=section.limits.to_engine(lookahead=0),
    )


async def measure_engine(
    name: str,
    setup: EngineSetup,
    cases: Sequence[Case],
    output_tokens: int,
) -> list[dict[str, object]]:
    """Rows of one engine."""
    rows = []
    async with EngineUnderTest(setup) as engine:
        assert engine.ready is not None
        shape = ModelShape(vocab_size=engine.ready.vocab_size, context_tokens=engine.ready.context_tokens)
        for case in cases:
            workload = make_workload(case.workload, shape, case.concurrency, output_tokens)
            rows.append(await measure_case(engine, name, workload))
    return rows


async def measure_case(engine: EngineUnderTest, name: str, workload: Workload) -> dict[str, object]:
    """One row of an engine; joules are the CPU estimate over its rank processes."""
    setup, ready = engine.setup, engine.ready
    assert ready is not None
    meter = CpuModelMeter(
        pids=[process.pid for process in engine.processes],
        static_w=ENERGY.cpu_static_w,
        core_w=ENERGY.cpu_core_w,
    )
    shape = ModelShape(vocab_size=ready.vocab_size, context_tokens=ready.context_tokens)
    # Another seed: a prefix cache must carry nothing over.
    await engine.run(
        make_workload(workload.name, shape, workload.concurrency, WARM_UP_OUTPUT_TOKENS, SEED + 1)
    )
    before = meter.read()
    run = await engine.run(workload)
    after = meter.read()
    row = (
        identity(ENGINE, wattline_version(), name, setup.dtype, workload)
        | summarize(run.times, wall_s=run.wall_s, prompt_tokens=workload.prompt_tokens)
        | energy_fields((after.energy_mj - before.energy_mj) / 1e3, after.source.value, workload)
        | {"tensor_parallel": setup.tensor, "expert_parallel": setup.expert}
        | {"threads_per_rank": setup.threads, "kernels": ready.kernels}
        | {"quantization": ready.quantization}
        | {"load_average": round(os.getloadavg()[0], 2)}
    )
    show(row)
    return row


async def measure_line(
    system: str, address: str, section: ModelSection, workload: Workload
) -> dict[str, object]:
    """One row of the whole line or of a bare server, as its gRPC clients see it."""
    short = make_workload("mix", shape_of(section), workload.concurrency, WARM_UP_OUTPUT_TOKENS, SEED + 1)
    await run_closed_loop(address, section.name, short)
    run: LineRun = await run_closed_loop(address, section.name, workload)
    row = (
        identity(system, wattline_version(), section.name, section.dtype, workload)
        | summarize(run.times, wall_s=run.wall_s, prompt_tokens=workload.prompt_tokens)
        | energy_fields(run.energy_j, run.energy_source, workload)
        | {"tensor_parallel": section.parallel.tensor, "expert_parallel": section.parallel.expert}
        | {"threads_per_rank": section.threads_per_rank}
        | (_bill_fields(run) if system == LINE else {})
    )
    show(row)
    return row


def _bill_fields(run: LineRun) -> dict[str, object]:
    """How soon the joules came; a bare server knows of none."""
    return {
        "energy_final_share": round(run.energy_final_share, 3),
        "energy_final_ms_p50": round(statistics.median(run.energy_final_ms), 1),
        "energy_final_ms_p99": round(percentile(run.energy_final_ms, 99), 1),
        "energy_in_time_share": round(run.share_in_time, 4),
    }


def line_shares(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """By model and concurrency: what line and bare server keep of the engine's own throughput.

    Medians over the rounds; the rows of all systems come in their order. And the part of the line's bills
    that were in time, over all rounds.
    """
    by_case: dict[tuple[object, object], dict[object, list[dict[str, object]]]] = {}
    for row in rows:
        by_system = by_case.setdefault((row["model"], row["concurrency"]), {})
        by_system.setdefault(row["system"], []).append(row)
    return [
        {
            "model": model,
            "concurrency": concurrency,
            "share_of_engine": _share(by_system[LINE], by_system[ENGINE]),
            "bare_share_of_engine": _share(by_system[BARE], by_system[ENGINE]),
            "energy_in_time_share": round(statistics.mean(map(_share_in_time, by_system[LINE])), 4),
        }
        for (model, concurrency), by_system in by_case.items()
    ]


def _share(rows: Sequence[dict[str, object]], of: Sequence[dict[str, object]]) -> float:
    return round(statistics.median(map(_rate_over, rows, of)), 3)


def _rate_over(row: dict[str, object], other: dict[str, object]) -> float:
    ours, theirs = row["output_tok_s"], other["output_tok_s"]
    assert isinstance(ours, float) and isinstance(theirs, float)
    return ours / theirs


def _share_in_time(row: dict[str, object]) -> float:
    share = row["energy_in_time_share"]
    assert isinstance(share, float)
    return share


@contextmanager
def serving(config: Config) -> Iterator[Stack]:
    """The models of `config` behind a router on free ports, in a scratch folder, until the block ends."""
    from cluster.commands.running import running_stack

    with tempfile.TemporaryDirectory(prefix="wlb-") as folder:
        free = config.router.model_copy(update={"grpc_port": 0, "http_port": 0, "link_port": 0})
        quiet = config.model_copy(update={"router": free, "runtime_dir": folder})
        with running_stack(quiet, console) as (stack, _interrupts):
            share_priority_below()
            yield stack


def shape_of(section: ModelSection) -> ModelShape:
    """Of a null model or of a checkpoint folder."""
    if section.is_null:
        null = section.null_engine
        return ModelShape(vocab_size=null.vocab_size, context_tokens=null.context_tokens)
    return checkpoint_shape(Path(section.source))


def show(row: dict[str, object]) -> None:
    console.print("  ".join(f"{key} [bold]{row[key]}[/]" for key in COLUMNS if key in row), highlight=False)


def finish(name: str, rows: list[dict[str, object]], path: Path | None, **more: object) -> None:
    """Print the table and write the file, with what else it says."""
    table = Table(title=name)
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console.print(table)
    for title, said in more.items():
        console.print(title, said)
    console.print(f"written to {write_results(name, rows, path, **more)}")
