"""What the energy agent costs its host, and how soon behind the end of a request its edge comes.

An agent process per load, one after another: beside each other they would keep the processor's caches warm
for one another. To compare, a Python process that only wakes up, which is the floor of any that polls here.
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
from cluster.config import EnergySection
from replicas.energy.agent_client import watch_readings
from replicas.energy.ask_pipe import Asker
from replicas.energy.cpu_model import cpu_time_ns

SETTLE_S = 8.0
"""Imports, first readings and the learning of edges are not what it costs to go on."""
SAY_S = 0.5
BARE_NAME = "bare sleep, 20 times a second"
BARE_SLEEP = "import sys, time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)"
BUSY = """
import os
os.nice(19)
print('ready', flush=True)
memory = memoryview(bytearray(64 << 20))
while True: sum(memory[::64])
"""
"""A neighbour that leaves nobody anything in the processor's caches."""
SEED = 7
CORE_W = EnergySection().cpu_core_w


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
    Load(name="such a counter, 5 requests end a second", meter="fake", is_running=True, ends_per_s=5.0),
)


async def run_agent_cost(
    poll_ms: float, seconds: float, neighbours: int, only: str, path: Path | None
) -> None:
    """Measure an agent for each load whose name has `only` in it, one after another, as it is alone on its
    host, beside so many busy processes of ours: its part of a core, and the waits."""
    rows: list[dict[str, object]] = []
    with _running([[sys.executable, "-c", BUSY]] * neighbours):
        if only in BARE_NAME:
            rows.append(await _measure_bare(seconds))
        for load in LOADS:
            if only in load.name:
                rows.append(await _measure(load, poll_ms, seconds))
    for row in rows:
        row["busy_neighbours"] = neighbours
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print(write_results("agent", rows, path))


async def _measure_bare(seconds: float) -> dict[str, object]:
    with _running([[sys.executable, "-c", BARE_SLEEP]]) as (process,):
        await asyncio.sleep(SETTLE_S)
        return {"process": BARE_NAME} | await _cost_fields(process.pid, seconds)


async def _measure(load: Load, poll_ms: float, seconds: float) -> dict[str, object]:
    """The agent of a load, in a process of its own; its watchers are in this one."""
    waits_ms: list[float] = []
    with tempfile.TemporaryDirectory(prefix="wlb-") as folder:
        address = f"unix:{folder}/energy.sock"
        listen = ["-m", "replicas.energy.agent", "--listen", address, "--poll-ms", str(poll_ms)]
        with _running([[sys.executable, *listen]]) as (process,):
            watches = [
                asyncio.create_task(_watch(address, load, number, waits_ms))
                for number in range(load.num_meters)
            ]
            await asyncio.sleep(SETTLE_S)
            waits_ms.clear()
            cost = await _cost_fields(process.pid, seconds)
            assert not any(watch.done() for watch in watches), "a watch ended while it was measured"
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
    return {"process": load.name, "poll_ms": poll_ms} | cost | _wait_fields(waits_ms)


async def _cost_fields(pid: int, seconds: float) -> dict[str, object]:
    """`power_mw`: that part of a core at the watts of a busy one in the estimate's model."""
    before, start_s = _use(pid), time.perf_counter()
    await asyncio.sleep(seconds)
    after, elapsed_s = _use(pid), time.perf_counter() - start_s
    share = (after.cpu_ns - before.cpu_ns) / 1e9 / elapsed_s
    return {
        "core_percent": round(100 * share, 4),
        "wakeups_per_s": round((after.num_wakeups - before.num_wakeups) / elapsed_s, 1),
        "power_mw": round(1e3 * share * CORE_W, 2),
        "load_average": round(os.getloadavg()[0], 2),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a process has used since it began, all its threads."""

    cpu_ns: int
    num_wakeups: int


def _use(pid: int) -> Use:
    used_ns = cpu_time_ns(pid)
    assert used_ns is not None, "it ended while it was measured"
    threads = [one.read_text() for one in Path(f"/proc/{pid}/task").glob("*/status")]
    waits = [int(one.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for one in threads]
    return Use(cpu_ns=used_ns, num_wakeups=sum(waits))


def _wait_fields(waits_ms: Sequence[float]) -> dict[str, object]:
    if len(waits_ms) < 2:
        return {}
    return {
        "requests": len(waits_ms),
        "edge_wait_ms_p50": round(statistics.median(waits_ms), 1),
        "edge_wait_ms_p99": round(statistics.quantiles(waits_ms, n=100)[98], 1),
    }


@contextmanager
def _running(commands: Sequence[Sequence[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Each ready; they end with the block."""
    found: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            found.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            )
        for process in found:
            assert process.stdout is not None
            assert process.stdout.readline(), "it ended before it was ready"
        yield found
    finally:
        for process in found:
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
