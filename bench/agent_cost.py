"""What the energy agent costs its host: CPU time of its process, unwatched and watched, beside a bare sleep.

All run at the same time, so that what else the machine does falls on each: an agent per number of meters, and
a Python process that only wakes as often as they read. That one is the floor of any program that polls here.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

from bench.record import write_results
from replicas.energy.agent_client import watch_readings
from replicas.energy.cpu_model import cpu_time_ns

SETTLE_S = 2.0
"""Imports and first readings are not what it costs to go on."""
BARE_SLEEP = "import sys, time\nprint('ready', flush=True)\nwhile True: time.sleep(float(sys.argv[1]))"


async def run_agent_cost(meters: list[int], poll_ms: float, seconds: float, path: Path | None) -> None:
    """Measure an agent for each number of watched meters: print and write its part of a core."""
    with tempfile.TemporaryDirectory(prefix="wlb-") as folder, _processes(folder, meters, poll_ms) as found:
        watches = [
            asyncio.create_task(_watch(f"unix:{folder}/{count}.sock", number))
            for count in meters
            for number in range(count)
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
        {
            "process": name,
            "poll_ms": poll_ms,
            "core_percent": round(100 * share, 4),
            "poll_us": round(1e3 * share * poll_ms, 1),
            "load_average": round(os.getloadavg()[0], 2),
        }
        for name, share in shares.items()
    ]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print(write_results("agent", rows, path))


@contextmanager
def _processes(folder: str, meters: list[int], poll_ms: float) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """By name, each ready; they end with the block."""
    commands = {"bare sleep": ["-c", BARE_SLEEP, str(poll_ms / 1e3)]}
    for count in meters:
        listen = ["--listen", f"unix:{folder}/{count}.sock", "--poll-ms", str(poll_ms)]
        commands[f"agent of {count}"] = ["-m", "replicas.energy.agent", *listen]
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


async def _watch(address: str, number: int) -> None:
    """A meter of its own: the estimate of two processes, which no other watch names."""
    pids = [os.getpid(), number + 1]
    async with aclosing(watch_readings(address, group=f"bench-{number}", pids=pids)) as readings:
        async for _ in readings:
            pass


def _cpu_ns(process: subprocess.Popen[str]) -> int:
    used_ns = cpu_time_ns(process.pid)
    assert used_ns is not None, "it ended while it was measured"
    return used_ns
