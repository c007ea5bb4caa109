"""`python -m bench`: measure the engine, the whole line, or the edge on this machine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure Wattline on this machine; one JSON file per run, with command, versions and hardware.",
    no_args_is_help=True,
)

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="result file; default bench/results/<name>-<date>.json")
]
ConcurrencyOption = Annotated[str, typer.Option(help="streams in flight, comma separated")]


def parse_concurrency(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1:
        raise typer.BadParameter(f"got {text!r}; give positive numbers such as 1,8,32")
    return values


@app.command()
def engine(
    model: Annotated[list[Path], typer.Option(help="checkpoint folder; repeat for several")],
    tp: Annotated[int, typer.Option(help="tensor-parallel ranks")] = 1,
    ep: Annotated[int, typer.Option(help="expert-parallel ranks of MoE models")] = 1,
    layout: Annotated[str, typer.Option(help="of the ranks: shared, dispatch")] = "shared",
    threads: Annotated[int, typer.Option(help="threads of each rank")] = 1,
    kernels: Annotated[str, typer.Option(help="CPU kernels, comma separated: auto, float32, off")] = "auto",
    quantization: Annotated[str, typer.Option(help="of the weights, comma separated: none, int8")] = "none",
    workload: Annotated[str, typer.Option(help="comma separated: mix, prefix")] = "mix",
    concurrency: ConcurrencyOption = "1,8,32",
    output_tokens: Annotated[int, typer.Option(help="tokens each request produces")] = 64,
    json: JsonOption = None,
) -> None:
    """The engine alone: rank processes behind their socket, no link, no router, no text."""
    from bench.engine import EngineSetup
    from bench.suites import run_engine_suite

    setups = [
        EngineSetup(
            source=str(one.resolve()),
            tensor=tp,
            expert=ep,
            layout=layout,
            threads=threads,
            kernels=kind,
            quantization=rounding,
        )
        for one in model
        for kind in kernels.split(",")
        for rounding in quantization.split(",")
    ]
    asyncio.run(
        run_engine_suite(setups, workload.split(","), parse_concurrency(concurrency), output_tokens, json)
    )


@app.command()
def line(
    config: Annotated[
        Path, typer.Option("-f", "--config", help="wattline.yaml of the models to serve")
    ] = Path("examples/demo.yaml"),
    concurrency: ConcurrencyOption = "1,8,32",
    output_tokens: Annotated[int, typer.Option(help="tokens each request produces")] = 64,
    json: JsonOption = None,
) -> None:
    """The whole line: gRPC client, router, link, engine under Ray Serve, beside the engine alone."""
    from bench.suites import run_line_suite

    asyncio.run(run_line_suite(config, parse_concurrency(concurrency), output_tokens, json))


@app.command()
def edge(
    concurrency: ConcurrencyOption = "1,8,32,128",
    output_tokens: Annotated[int, typer.Option(help="tokens each request produces")] = 256,
    step_ms: Annotated[float, typer.Option(help="step time of the null engine")] = 0.0,
    json: JsonOption = None,
) -> None:
    """What router and link cost per token, over a null engine: CPU microseconds of each process."""
    from bench.suites import run_edge_suite

    asyncio.run(run_edge_suite(parse_concurrency(concurrency), output_tokens, step_ms, json))


@app.command()
def overhead(
    batch: Annotated[str, typer.Option(help="decoding sequences, comma separated")] = "1,8,32,64,128,256",
    steps: Annotated[int, typer.Option(help="steps measured")] = 300,
    json: JsonOption = None,
) -> None:
    """What a step costs outside the model: schedule, plan words, commit, and the frame to the supervisor."""
    from bench.overhead import run_overhead_suite

    run_overhead_suite(parse_concurrency(batch), steps, json)


@app.command()
def recovery(
    config: Annotated[
        Path, typer.Option("-f", "--config", help="wattline.yaml of the models to serve")
    ] = Path("examples/demo.yaml"),
    repeats: Annotated[int, typer.Option(help="kills per model")] = 2,
    json: JsonOption = None,
) -> None:
    """How long a model is away when a rank of it is killed under a stream."""
    from bench.recovery import run_recovery_suite

    run_recovery_suite(config, repeats, json)


if __name__ == "__main__":
    app()
