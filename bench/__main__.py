"""`python -m bench`: measure the engine, its peers, the whole line, or the edge on this machine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from bench.peers.adapter import ADAPTERS, UNCACHED
from bench.workload import WORKLOADS, Case
from cluster.servers import event_loop

app = typer.Typer(
    help="Measure Wattline on this machine; one JSON file per run, with command, versions and hardware.",
    no_args_is_help=True,
)

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="result file; default bench/results/<name>-<date>.json")
]
ConcurrencyOption = Annotated[str, typer.Option(help="streams in flight, comma separated")]
ModelOption = Annotated[
    list[Path],
    typer.Option(help="checkpoint folder; repeatable", exists=True, file_okay=False, resolve_path=True),
]
WorkloadOption = Annotated[
    str, typer.Option(help="comma separated: mix, prefix, long; prefix:8 runs at 8 streams only")
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]


def parse_concurrency(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1:
        raise typer.BadParameter(f"got {text!r}; give positive numbers such as 1,8,32")
    return values


def parse_peer(text: str) -> tuple[str, str]:
    """A peer's name and its interpreter."""
    name, _, python = text.partition("=")
    if not python:
        raise typer.BadParameter(f"got {text!r}; give NAME=PYTHON, such as vllm=/opt/vllm/bin/python")
    if name.removesuffix(UNCACHED) not in ADAPTERS:
        raise typer.BadParameter(f"no peer {name!r}; one of {', '.join(ADAPTERS)}, each also with {UNCACHED}")
    return name, str(Path(python).expanduser())


def parse_workloads(text: str) -> list[tuple[str, str]]:
    """Names, and the concurrency that a name carries of its own: `mix,prefix:8`."""
    pairs = [part.partition(":")[::2] for part in text.split(",")]
    for name, _ in pairs:
        if name not in WORKLOADS:
            raise typer.BadParameter(f"no workload {name!r}; one of {', '.join(WORKLOADS)}")
    return pairs


def parse_cases(workload: str, concurrency: str) -> list[Case]:
    """Every workload at its own concurrency, or at each of the common ones."""
    return [
        Case(workload=name, concurrency=streams)
        for name, own in parse_workloads(workload)
        for streams in parse_concurrency(own or concurrency)
    ]


@app.command()
def engine(
    model: ModelOption,
    dtype: DtypeOption = "auto",
    tp: Annotated[int, typer.Option(help="tensor-parallel ranks")] = 1,
    ep: Annotated[int, typer.Option(help="expert-parallel ranks of MoE models")] = 1,
    layout: Annotated[str, typer.Option(help="of the ranks: shared, dispatch")] = "shared",
    threads: Annotated[int, typer.Option(help="threads of each rank")] = 1,
    kernels: Annotated[str, typer.Option(help="CPU kernels, comma separated: auto, float32, off")] = "auto",
    quantization: Annotated[str, typer.Option(help="of the weights, comma separated: none, int8")] = "none",
    workload: WorkloadOption = "mix",
    concurrency: ConcurrencyOption = "1,8,32",
    output_tokens: Annotated[int, typer.Option(help="tokens each request produces")] = 64,
    json: JsonOption = None,
) -> None:
    """The engine alone: rank processes behind their socket, no link, no router, no text."""
    from bench.engine import EngineSetup
    from bench.suites import run_engine_suite

    setups = [
        EngineSetup(
            source=str(one),
            tensor=tp,
            expert=ep,
            layout=layout,
            threads=threads,
            dtype=dtype,
            kernels=kind,
            quantization=rounding,
        )
        for one in model
        for kind in kernels.split(",")
        for rounding in quantization.split(",")
    ]
    asyncio.run(run_engine_suite(setups, parse_cases(workload, concurrency), output_tokens, json))


@app.command()
def ranks(
    model: ModelOption,
    split: Annotated[
        str, typer.Option(help="comma separated: solo, tp2, ep2, dispatch2; the first is the measure")
    ] = "solo,tp2",
    threads: Annotated[int, typer.Option(min=1, help="of every engine; its ranks share them")] = 2,
    kernels: Annotated[str, typer.Option(help="CPU kernels: auto, float32, off")] = "auto",
    workload: WorkloadOption = "mix",
    concurrency: ConcurrencyOption = "8",
    rounds: Annotated[int, typer.Option(min=1, help="times every split runs every case, in turn")] = 5,
    output_tokens: Annotated[int, typer.Option(min=1, help="tokens each request produces")] = 64,
    json: JsonOption = None,
) -> None:
    """One rank on all cores beside several that share them: tensor parallel, experts shared or dispatched."""
    from bench.ranks import RanksPlan, parse_split, run_ranks_suite, setup_of

    try:
        plan = RanksPlan(
            models=tuple(model),
            splits=tuple(parse_split(one) for one in split.split(",")),
            cases=tuple(parse_cases(workload, concurrency)),
            kernels=kernels,
            threads=threads,
            rounds=rounds,
            output_tokens=output_tokens,
        )
        for one in plan.splits:
            setup_of(one, model[0], plan)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    asyncio.run(run_ranks_suite(plan, json))


@app.command()
def peers(
    model: ModelOption,
    peer: Annotated[
        list[str],
        typer.Option(
            help="NAME=PYTHON: vllm, openvino, llamacpp, transformers or transformers-static, and the "
            "interpreter that has it; NAME-uncached switches its prefix cache off; repeat for several"
        ),
    ],
    workload: WorkloadOption = "mix,prefix:8,long:8",
    concurrency: ConcurrencyOption = "1,8,32",
    dtype: DtypeOption = "float32",
    threads: Annotated[int, typer.Option(help="cores of every engine")] = 2,
    kernels: Annotated[
        str, typer.Option(help="CPU kernels of our engines, comma separated: auto, float32, off")
    ] = "auto,float32",
    tp: Annotated[int, typer.Option(help="tensor-parallel ranks of our engine, sharing the threads")] = 1,
    ep: Annotated[int, typer.Option(help="expert-parallel ranks of our engine, sharing the threads")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="times every engine runs every case, in turn")] = 3,
    output_tokens: Annotated[int, typer.Option(min=1, help="tokens each request produces")] = 64,
    requests_per_stream: Annotated[int, typer.Option(min=1, help="requests one after another")] = 4,
    converted: Annotated[Path, typer.Option(help="folder for checkpoints in the peers' own formats")] = Path(
        "~/.cache/wattline/peers"
    ),
    json: JsonOption = None,
) -> None:
    """Our engine beside others: same checkpoint, precision, prompts and cores, in turn, in one run.

    Example: python -m bench peers --model ckpt/llama-60m --peer vllm=~/vllm/bin/python --peer openvino=...
    docs/benchmarks.md says how to install the peers and how to read the result.
    """
    from bench.peers.suite import PeersPlan, run_peers_suite

    plan = PeersPlan(
        models=tuple(model),
        peers=dict(parse_peer(one) for one in peer),
        cases=tuple(parse_cases(workload, concurrency)),
        kernels=tuple(kernels.split(",")),
        dtype=dtype,
        threads=threads,
        tensor=tp,
        expert=ep,
        rounds=rounds,
        output_tokens=output_tokens,
        requests_per_stream=requests_per_stream,
        converted=converted.expanduser(),
    )
    asyncio.run(run_peers_suite(plan, json))


@app.command()
def line(
    config: Annotated[
        Path, typer.Option("-f", "--config", help="wattline.yaml of the models to serve")
    ] = Path("examples/demo.yaml"),
    concurrency: ConcurrencyOption = "1,8,32",
    output_tokens: Annotated[int, typer.Option(help="tokens each request produces")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="times line and engine run every case, in turn")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="of each rank; 0: as the file says")] = 0,
    json: JsonOption = None,
) -> None:
    """The whole line: gRPC client, router, link, engine under Ray Serve, beside the engine alone."""
    from bench.suites import run_line_suite, with_threads
    from cluster.config import load_config

    cases = parse_concurrency(concurrency)
    event_loop.run(
        run_line_suite(with_threads(load_config(config), threads), cases, output_tokens, rounds, json)
    )


@app.command()
def edge(
    concurrency: Annotated[str, typer.Option(help="streams at once, comma separated")] = "1,8,32,128,512",
    ttft_concurrency: Annotated[
        str, typer.Option(help="streams of the paced engine whose first tokens are timed, comma separated")
    ] = "1,8",
    step_ms: Annotated[float, typer.Option(min=0.0, help="step time of the paced engine")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="times every system runs every case, in turn")] = 3,
    window: Annotated[float, typer.Option(min=0.1, help="seconds that each case is watched")] = 2.0,
    ray_serve: Annotated[bool, typer.Option(help="measure Ray Serve's gRPC proxy too")] = True,
    json: JsonOption = None,
) -> None:
    """Streamed tokens/s of router and link over a null engine, beside bare gRPC and Ray Serve's proxy.

    With added time to first token, CPU microseconds per token of each process, and stalled readers.
    """
    from bench.edge.suite import EdgePlan, run_edge_suite

    plan = EdgePlan(
        streams=tuple(parse_concurrency(concurrency)),
        ttft_streams=tuple(parse_concurrency(ttft_concurrency)),
        rounds=rounds,
        window_s=window,
        step_ms=step_ms,
        has_ray_serve=ray_serve,
    )
    event_loop.run(run_edge_suite(plan, json))


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


@app.command()
def balance(
    model: Annotated[
        list[Path] | None,
        typer.Option(help="checkpoint folder to serve on two real replicas as well; repeatable"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="how long each load is offered to real replicas")] = 12.0,
    rounds: Annotated[int, typer.Option(min=1, help="times every policy runs on real replicas, in turn")] = 2,
    json: JsonOption = None,
) -> None:
    """Balancing policies against each other, simulated and on real replicas: TTFT, tokens/s, J/token."""
    from bench.balance import run_balance

    run_balance(model or [], seconds, rounds, json)


@app.command()
def overload(
    seconds: Annotated[float, typer.Option(help="how long each load is offered to real replicas")] = 8.0,
    json: JsonOption = None,
) -> None:
    """Up to five times what there is room for: simulated, then a real router with null-engine replicas."""
    from bench.overload import run_overload

    run_overload(seconds, json)


@app.command()
def ledger(
    batches: Annotated[str, typer.Option(help="sequences of a step, comma separated")] = "1,8,32,128",
    windows: Annotated[int, typer.Option(min=1, help="meter windows of ten steps")] = 60,
    json: JsonOption = None,
) -> None:
    """What the energy ledger costs the supervisor: CPU microseconds per step record."""
    from bench.ledger_cost import run_ledger_cost

    run_ledger_cost([int(one) for one in batches.split(",")], windows, json)


@app.command()
def ledger_share(
    checkpoint: Annotated[Path, typer.Option(help="folder of the model that both replicas serve")] = Path(
        "examples/models/llama-demo"
    ),
    concurrency: Annotated[int, typer.Option(min=1, help="streams at once")] = 32,
    output_tokens: Annotated[int, typer.Option(min=2, help="tokens each request produces")] = 32,
    rounds: Annotated[int, typer.Option(min=2, help="turns of each, one after the other")] = 8,
    json: JsonOption = None,
) -> None:
    """What the energy ledger takes of a line's throughput: one checkpoint with it and without, in turn."""
    from bench.ledger_share import run_ledger_share

    event_loop.run(run_ledger_share(checkpoint, concurrency, output_tokens, rounds, json))


@app.command()
def agent(
    poll_ms: Annotated[float, typer.Option(min=5.0, help="energy.poll_ms of the agents")] = 50.0,
    seconds: Annotated[float, typer.Option(min=1.0, help="of measuring, each load")] = 10.0,
    neighbours: Annotated[int, typer.Option(min=0, help="busy processes beside it")] = 0,
    only: Annotated[str, typer.Option(help="loads with this in their name")] = "",
    json: JsonOption = None,
) -> None:
    """What the energy agent costs its host, and how soon an edge comes behind the end of a request."""
    from bench.agent_cost import run_agent_cost

    asyncio.run(run_agent_cost(poll_ms, seconds, neighbours, only, json))


@app.command()
def shapley(
    requests: Annotated[int, typer.Option(min=2, help="requests of each mix")] = 300,
    orders: Annotated[int, typer.Option(min=2, help="orders of arrival sampled per step")] = 256,
    windows: Annotated[str, typer.Option(help="seconds between meter edges, comma separated")] = "0.1",
    json: JsonOption = None,
) -> None:
    """The ledger's bills against Shapley values, over six simulated mixes: joules on the wrong request."""
    from bench.shapley_mixes import run_shapley

    run_shapley(requests, orders, [float(one) for one in windows.split(",")], json)


if __name__ == "__main__":
    app()
