"""Clocks that jump. Case 25 of the fault matrix."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}
READS_THE_WALL_CLOCK = {
    # Dates that people set or read: keys that expire, reports since when, answers created at, events.
    "cluster/commands/energy.py",
    "cluster/commands/key.py",
    "cluster/dashboard/feed.py",
    "cluster/openai/answer.py",
    "cluster/openai/routes.py",
    "cluster/security/auth.py",
    "cluster/link/fleet_record.py",
    # A jump ahead may end resume tokens early; spans carry the times of the wall.
    "cluster/request/resume_token.py",
    "cluster/telemetry/inference_span.py",
    # Entries of the ledger, and the day that a budget of joules is of.
    "cluster/ledger/process.py",
    "cluster/router/bookkeeping.py",
    "cluster/edge/process.py",
    "cluster/edge/parts.py",
    # Epochs of replicas; of two lives on one host the later one has the greater.
    "replicas/supervisor/supervisor.py",
}


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
