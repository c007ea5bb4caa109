"""A host that runs out of something, and clocks. Case 25 of the fault matrix."""

from __future__ import annotations

import ast
import asyncio
import resource
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.client import Ask, Client
from replicas.rank.null_runner import null_continuation
from tests.integration.test_router_loss import NULL, PROMPT, answer, two_routers

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS = 300
SPARE_FDS = 8
WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}
READS_THE_WALL_CLOCK = {
    # Dates that people set or read: keys that expire, reports since when, answers created at.
    "cluster/commands/energy.py",
    "cluster/commands/key.py",
    "cluster/dashboard/feed.py",
    "cluster/openai/answer.py",
    "cluster/openai/routes.py",
    "cluster/router/auth.py",
    # Entries of the ledger, and the day that a budget of joules is of.
    "cluster/ledger/process.py",
    "cluster/router/bookkeeping.py",
    "cluster/router/process.py",
    "cluster/router/parts.py",
    # Epochs of replicas; of two lives on one host the later one has the greater.
    "replicas/supervisor/supervisor.py",
}


@pytest.mark.processes
@pytest.mark.chaos
@pytest.mark.slow
async def test_a_router_without_descriptors_keeps_its_streams_and_recovers() -> None:
    """Case 25. Promise: connections beyond the limit wait or fail, streams go on, and it serves again."""
    ask = Ask(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    async with two_routers() as (router, _):
        pid, (host, _, port) = router.process.pid, router.addresses.http.rpartition(":")
        allowed = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        with Client(router.addresses.grpc) as client:
            before = await asyncio.to_thread(answer, client, ask)
            in_use = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (in_use + SPARE_FDS, allowed[1]))
            crowd = []
            for _ in range(8 * SPARE_FDS):
                with suppress(OSError):
                    crowd.append(await asyncio.open_connection(host, int(port)))
            during = await asyncio.to_thread(answer, client, ask)
            for _, writer in crowd:
                writer.close()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, allowed)
        with Client(router.addresses.grpc) as client:
            after = await asyncio.to_thread(answer, client, ask)
        assert router.process.returncode is None
    expected = null_continuation(PROMPT, NUM_TOKENS, NULL)
    assert before.token_ids == during.token_ids == after.token_ids == expected


@pytest.mark.chaos
def test_only_what_is_written_down_reads_the_wall_clock() -> None:
    """Case 25. Promise: a clock that jumps moves no deadline, wait or retry: those are of monotonic clocks.

    A clock cannot be set without privileges; this is the list of files that a jump can reach.
    """
    readers = {
        str(path.relative_to(ROOT))
        for package in ("cluster", "replicas", "autoscale")
        for path in (ROOT / package).rglob("*.py")
        if reads_wall_clock(ast.parse(path.read_text()))
    }
    assert readers <= READS_THE_WALL_CLOCK


def reads_wall_clock(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            names = {f"time.{name.name}" for name in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {f"{node.value.id}.{node.attr}"}
        else:
            continue
        if names & WALL_CLOCKS:
            return True
    return False
