"""Processes of a rank group: nobody outlives the group, the supervisor, or a kill."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.supervisor.rank_group import SubprocessRankGroup

pytestmark = pytest.mark.processes

WAIT_S = 150.0

SLEEPER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(f"child {child.pid} threads {os.environ['OMP_NUM_THREADS']}", flush=True)
time.sleep(600)
"""
FAILER = """
import sys
sys.exit("the checkpoint is torn")
"""
PARENT = """
import asyncio, sys, time
from pathlib import Path
from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.supervisor.rank_group import SubprocessRankGroup

async def main():
    folder = Path(sys.argv[1])
    config = RankConfig(group="g", epoch=1, rank=0, source="null",
                        parallel=ParallelConfig(), limits=EngineLimits())
    (rank,) = await SubprocessRankGroup(runtime_dir=folder, module="sleeper").start([config])
    print(rank.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that ranks can run instead of an engine."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "failer.py").write_text(FAILER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def make_configs(num_ranks: int) -> list[RankConfig]:
    return [
        RankConfig(
            group="g",
            epoch=1,
            rank=rank,
            source="null",
            parallel=ParallelConfig(tensor=num_ranks),
            limits=EngineLimits(),
            threads=3,
        )
        for rank in range(num_ranks)
    ]


async def read_child(log_path: Path) -> tuple[int, int]:
    """The pid of the sleeper's own child and its thread count, once it has said so."""
    for _ in range(round(WAIT_S / 0.02)):
        words = log_path.read_text().split()
        if len(words) == 4:
            return int(words[1]), int(words[3])
        await asyncio.sleep(0.02)
    raise AssertionError(f"nothing in {log_path}")


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def until_dead(pid: int) -> None:
    """Not until it is gone: an orphan stays a zombie where process 1 reaps none."""
    async with asyncio.timeout(WAIT_S):
        while is_alive(pid):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_kill_ends_ranks_and_their_children(modules: Path) -> None:
    group = SubprocessRankGroup(runtime_dir=modules / "run", module="sleeper")
    ranks = await group.start(make_configs(2))
    assert [(rank.rank, rank.device) for rank in ranks] == [(0, "cpu"), (1, "cpu")]
    children = [await read_child(modules / "run" / f"g-1-rank{rank}.log") for rank in range(2)]
    assert [threads for _, threads in children] == [3, 3]
    os.kill(ranks[1].pid, signal.SIGSTOP)
    await group.kill()
    await group.kill()
    assert [
        pid for pid in (*(rank.pid for rank in ranks), *(pid for pid, _ in children)) if is_alive(pid)
    ] == []
    assert list((modules / "run").glob("*.json")) == []


async def test_the_first_death_is_told_with_its_last_words(modules: Path) -> None:
    group = SubprocessRankGroup(runtime_dir=modules / "run", module="failer")
    (rank,) = await group.start(make_configs(1))
    reason = await group.wait_death()
    assert reason.startswith(f"rank 0 (pid {rank.pid}) exited with code 1: the checkpoint is torn; log: ")
    await group.kill()


async def test_a_signal_is_told_by_name(modules: Path) -> None:
    group = SubprocessRankGroup(runtime_dir=modules / "run", module="sleeper")
    ranks = await group.start(make_configs(2))
    await read_child(modules / "run" / "g-1-rank1.log")
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert (await group.wait_death()).startswith(f"rank 1 (pid {ranks[1].pid}) killed by SIGKILL")
    await group.kill()


def test_a_rank_dies_with_its_supervisor(modules: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(modules / "run")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    rank_pid = int(parent.stdout.readline())
    child, _ = asyncio.run(read_child(modules / "run" / "g-1-rank0.log"))
    try:
        parent.kill()
        parent.wait(timeout=WAIT_S)
        asyncio.run(until_dead(rank_pid))
    finally:
        parent.stdout.close()
        psutil.Process(child).kill()
