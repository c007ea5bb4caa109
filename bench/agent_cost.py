"""What the energy agent costs its host, and how soon behind the end of a request its edge comes.

An agent process per load, all at the same time, so that what else the machine does falls on each; and beside
them a Python process that only wakes up, which is the floor of any program that polls here.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.record import write_results
from replicas.energy.agent_client import watch_readings
from replicas.energy.ask_pipe import Asker
from replicas.energy.cpu_model import cpu_time_ns

SETTLE_S = 2.0
"""Imports and first readings are not what it costs to go on."""
SAY_S = 0.5
BARE_SLEEP = "import sys, time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)"
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the watchers of one agent do: `ends_per_s` requests end at each, at random times.

    `is_running`: they say that requests run. `is_alone`: one after the other, so each begin asks, too.
    """

    name: str
    meter: str = "cpu-model"
    num_meters: int = 1
    is_running: bool = False
    is_alone: bool = False
    ends_per_s: float = 0.0


LOADS = (
    Load(name="not watched", num_meters=0),
    Load(name="nothing runs"),
    Load(name="one long request", is_running=True),
    Load(name="one request after the other, 2 a second", is_running=True, is_alone=True, ends_per_s=2.0),
    Load(name="5 requests end a second", is_running=True, ends_per_s=5.0),
    Load(name="20 requests end a second", is_running=True, ends_per_s=20.0),
    Load(name="four meters, long requests", num_meters=4, is_running=True),
    Load(name="a counter with edges each 100 ms, long requests", meter="fake", is_running=True),
)


async def run_agent_cost(poll_ms: float, seconds: float, path: Path | None) -> None:
    """Measure an agent for each load: print and write its part of a core, and the wait for edges."""
    waits_ms: dict[str, list[float]] = {load.name: [] for load in LOADS}
    with tempfile.TemporaryDirectory(prefix="wlb-") as folder, _processes(folder, poll_ms) as found:
        watches = [
            asyncio.create_task(_watch(f"unix:{folder}/{index}.sock", load, number, waits_ms[load.name]))
            for index, load in enumerate(LOADS)
            for number in range(load.num_meters)
        ]
        await asyncio.sleep(SETTLE_S)
        before, start_s = {name: _cpu_ns(one) for name, one in found.items()}, time.perf_counter()
        await asyncio.sleep(seconds)
        elapsed_s = time.perf_counter() - start_s
        shares = {name: (_cpu_ns(one) - before[name]) / 1e9 / elapsed_s for name, one in found.items()}
        assert not any(watch.done() for watch in watches), "a watch ended while it was measured"
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
    rows: list[dict[str, object]] = [
        {"process": name, "poll_ms": poll_ms, "core_percent": round(100 * share, 4)}
        | _wait_fields(waits_ms.get(name, ()))
        | {"load_average": round(os.getloadavg()[0], 2)}
        for name, share in shares.items()
    ]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print(write_results("agent", rows, path))


def _wait_fields(waits_ms: Sequence[float]) -> dict[str, object]:
    if len(waits_ms) < 2:
        return {}
    return {
        "requests": len(waits_ms),
        "edge_wait_ms_p50": round(statistics.median(waits_ms), 1),
        "edge_wait_ms_p99": round(statistics.quantiles(waits_ms, n=100)[98], 1),
    }


@contextmanager
def _processes(folder: str, poll_ms: float) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """By name, each ready; they end with the block."""
    commands = {"bare sleep, 20 times a second": ["-c", BARE_SLEEP]}
    for index, load in enumerate(LOADS):
        listen = ["--listen", f"unix:{folder}/{index}.sock", "--poll-ms", str(poll_ms)]
        commands[load.name] = ["-m", "replicas.energy.agent", *listen]
    found: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, arguments in commands.items():
            found[name] = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
        for process in found.values():
            assert process.stdout is not None
            assert process.stdout.readline(), "it ended before it was ready"
        yield found
    finally:
        for process in found.values():
            process.kill()
            process.wait()


async def _watch(address: str, load: Load, number: int, waits_ms: list[float]) -> None:
    """A meter of its own: the estimate of two processes, which no other watch names."""
    asker = Asker()
    ended_ns: list[int] = []
    pids = [os.getpid(), number + 1]
    watch = watch_readings(address, group=f"bench-{number}", pids=pids, meter=load.meter, asker=asker)
    async with asyncio.TaskGroup() as tasks, aclosing(watch) as readings:
        if load.is_running:
            tasks.create_task(_say_running(asker))
        if load.ends_per_s:
            tasks.create_task(_end_requests(load, asker, ended_ns))
        async for reading in readings:
            now_ns = time.monotonic_ns()
            waits_ms.extend((now_ns - one_ns) / 1e6 for one_ns in ended_ns if one_ns <= reading.t_ns)
            ended_ns[:] = [one_ns for one_ns in ended_ns if one_ns > reading.t_ns]


async def _say_running(asker: Asker) -> None:
    while True:
        asker.note_running()
        await asyncio.sleep(SAY_S)


async def _end_requests(load: Load, asker: Asker, ended_ns: list[int]) -> None:
    """As a supervisor does: it asks when a request begins that is the first, and when one ends."""
    draw = random.Random(SEED)
    while True:
        if load.is_alone:
            await asyncio.sleep(0.1 * draw.uniform(0.5, 1.5))
            asker.ask()
        await asyncio.sleep(draw.uniform(0.5, 1.5) / load.ends_per_s - 0.1 * load.is_alone)
        ended_ns.append(time.monotonic_ns())
        asker.ask()


def _cpu_ns(process: subprocess.Popen[str]) -> int:
    used_ns = cpu_time_ns(process.pid)
    assert used_ns is not None, "it ended while it was measured"
    return used_ns
