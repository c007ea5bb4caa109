"""What the energy ledger takes of a line's throughput: one checkpoint served with it and without, in turn.

Two replicas of the same checkpoint behind one router: one is metered, by an energy agent of its own, and its
ledger divides each step; the other is not, and has no ledger. Clients of this process load them in turn, so
what else the machine does falls on both. Beside the tokens a second stands the CPU time of a token, which
feels other work less: of the rank, of all else (client, router, supervisor), and of the agent. Of all else,
`cpu_samples.py` says how much is about joules, from the step record to the bill on the wire.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.closed_loop import run_closed_loop
from bench.cpu_samples import sampling
from bench.record import write_results
from bench.workload import Draw, ModelShape, Workload, mix
from cluster.config import parse_config
from cluster.edge.process import Router
from cluster.text.tokenizers import CheckpointTokenizer
from replicas.config import EngineLimits, ReplicaConfig
from replicas.energy.cpu_model import cpu_time_ns
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor

MODELS = ("metered", "bare")
START_S = 300.0
SHAPE = ModelShape(vocab_size=1000, context_tokens=1024)
JOULE_FILES = ("replicas/energy/", "cluster/energy/", "supervisor/energy_account", "supervisor/meter_feed")
JOULE_FUNCTIONS = frozenset(
    {
        *("settle_energy", "_report_provisional", "_state_energy", "ledger", "add_ledger", "add_energy"),
        *("take_energy", "_book_ledger", "parse_energy", "_count_energy", "add_bill", "energy_message"),
    }
)
WAVES = 2
"""Requests of a turn, by concurrency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One model under load: tokens a second, and CPU microseconds per output token by who spent them.

    `joules_us` is the part of `rest` that was spent on joules.
    """

    tokens_per_s: float
    cpu_us: Mapping[str, float]
    joules_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Where to ask, and the processes that work: their CPU time so far, by model and by name."""

    address: str
    cpu_ns: Mapping[str, Mapping[str, Callable[[], int]]]


async def run_ledger_share(
    checkpoint: Path, concurrency: int, output_tokens: int, rounds: int, path: Path | None
) -> None:
    """Load both models `rounds` times in turn: print and write each turn, and the ratios of the pairs."""
    pairs: list[dict[str, Turn]] = []
    async with serving_both(checkpoint, concurrency) as line:
        for number in range(-1, rounds):
            # Who comes first changes, and the first round only warms.
            order = MODELS if number % 2 else MODELS[::-1]
            workload = mix(
                Draw(
                    model=SHAPE,
                    concurrency=concurrency,
                    num_requests=WAVES * concurrency,
                    output_tokens=output_tokens,
                    seed=number,
                )
            )
            pair = {model: await take_turn(line, model, workload) for model in order}
            if number >= 0:
                pairs.append(pair)
                print(
                    "  ".join(f"{model} {pair[model].tokens_per_s:.0f} tok/s" for model in MODELS), flush=True
                )
    summary = summarize(pairs)
    print("  ".join(f"{key} {value}" for key, value in summary.items()))
    rows = [
        {"model": model, "tokens_per_s": round(turn.tokens_per_s, 1)}
        | {f"{name}_us_per_token": round(us, 2) for name, us in turn.cpu_us.items()}
        | {"joules_us_per_token": round(turn.joules_us, 2)}
        for pair in pairs
        for model, turn in pair.items()
    ]
    about = {"checkpoint": checkpoint.name, "concurrency": concurrency, "output_tokens": output_tokens}
    print(write_results("ledger-share", rows, path, **about, summary=summary))


def summarize(pairs: Sequence[Mapping[str, Turn]]) -> dict[str, object]:
    """By how much the metered model is slower than the bare one beside it, and what of its CPU is joules'."""
    slower = [100 * (1 - pair["metered"].tokens_per_s / pair["bare"].tokens_per_s) for pair in pairs]
    low, middle, high = statistics.quantiles(slower, n=4)
    metered = [pair["metered"] for pair in pairs]
    joules_us = [turn.joules_us + turn.cpu_us["agent"] for turn in metered]
    shares = [us / sum(turn.cpu_us.values()) for us, turn in zip(joules_us, metered, strict=True)]
    return {
        "pairs": len(pairs),
        "slower_percent_p50": round(middle, 2),
        "slower_percent_p25_p75": [round(low, 2), round(high, 2)],
        "joules_us_per_token_p50": round(statistics.median(joules_us), 2),
        "joules_cpu_percent_p50": round(100 * statistics.median(shares), 2),
    }


async def take_turn(line: Line, model: str, workload: Workload) -> Turn:
    before = {name: read() for name, read in line.cpu_ns[model].items()}
    with sampling(is_about_joules) as samples:
        run = await run_closed_loop(line.address, model, workload)
    num_tokens = workload.total_output_tokens
    assert (run.energy_j is None) == (model == "bare"), "the metered model has joules, the other none"
    return Turn(
        tokens_per_s=num_tokens / run.wall_s,
        cpu_us={
            name: (read() - before[name]) / 1e3 / num_tokens for name, read in line.cpu_ns[model].items()
        },
        joules_us=samples.hit_s * 1e6 / num_tokens,
    )


def is_about_joules(file: str, function: str) -> bool:
    """Whether this code would not run without a meter."""
    return any(part in file for part in JOULE_FILES) or function in JOULE_FUNCTIONS


@asynccontextmanager
async def serving_both(checkpoint: Path, concurrency: int) -> AsyncIterator[Line]:
    ports = {"grpc_port": 0, "http_port": 0, "link_port": 0}
    models = [{"name": model, "source": str(checkpoint)} for model in MODELS]
    config = parse_config({"models": models, "router": ports, "ledger": {"enabled": False}})
    tokenizer = CheckpointTokenizer(checkpoint)
    router = Router(config, tokenizers=dict.fromkeys(MODELS, tokenizer))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wlb-")))
        addresses = await router.start()
        stack.push_async_callback(router.stop, drain_s=0.0)
        agent = start_agent(folder / "agent.sock")
        stack.callback(agent.wait)
        stack.callback(agent.terminate)
        cpu_ns: dict[str, dict[str, Callable[[], int]]] = {}
        for model in MODELS:
            replica = ReplicaConfig(
                model=model,
                source=str(checkpoint),
                replica_id=model,
                routers=(addresses.link,),
                limits=EngineLimits(max_sequences=concurrency, max_waiting=concurrency, num_blocks=1024),
                runtime_dir=str(folder / model),
                shared_dir=str(folder),
                energy_agent=f"unix:{folder}/agent.sock" if model == "metered" else "",
                meter="cpu-model",
                stall_floor_s=START_S,
            )
            ranks = SubprocessRankGroup(runtime_dir=Path(replica.runtime_dir))
            supervisor = Supervisor(replica, ranks, _lost, first_link_timeout_s=START_S)
            await supervisor.start()
            stack.push_async_callback(supervisor.stop)
            (rank,) = supervisor.processes
            cpu_ns[model] = {"rank": clock_of(rank.pid), "rest": time.process_time_ns}
            cpu_ns[model] |= {"agent": clock_of(agent.pid)} if model == "metered" else {"agent": lambda: 0}
        yield Line(address=addresses.grpc, cpu_ns=cpu_ns)


def start_agent(socket: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "replicas.energy.agent", "--listen", f"unix:{socket}"]
    return subprocess.Popen(
        [*command, "--host-meter", "off"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def clock_of(pid: int) -> Callable[[], int]:
    return lambda: cpu_time_ns(pid) or 0


def _lost(reason: str) -> None:
    raise RuntimeError(f"a replica was lost: {reason}")
