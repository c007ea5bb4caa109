"""`wattline top` in a real terminal: it draws, it leaves on q, and it gives the terminal back."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.router_fixture import TestRouter, collect, make_request, run_test_router

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 150


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    async with run_test_router() as running:
        yield running


async def start_top(router: TestRouter, *options: str, terminal: int) -> asyncio.subprocess.Process:
    arguments = ("-m", "cluster.cli", "top", "-a", router.addresses.grpc, *options)
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )


def read_all(terminal: int) -> str:
    """What was drawn so far."""
    try:
        return os.read(terminal, 1 << 16).decode(errors="replace")
    except BlockingIOError:
        return ""


async def test_q_quits_and_the_terminal_is_as_before(router: TestRouter) -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    before = termios.tcgetattr(theirs)
    async with router.replica():
        await collect(router.inference.Generate(make_request("hello", energy_wait_ms=1000)))
        process = await start_top(router, terminal=theirs)
        drawn = ""
        async with asyncio.timeout(WAIT_S):
            while "q quits" not in drawn or "length" not in drawn:
                drawn += read_all(ours)
                await asyncio.sleep(0.05)
            os.write(ours, b"q")
            while process.returncode is None:  # What nobody reads would hold it up.
                read_all(ours)
                await asyncio.sleep(0.05)
            assert process.returncode == 0
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


async def test_once_prints_and_returns(router: TestRouter) -> None:
    async with router.replica():
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "cluster.cli", "top", "--once", "-a", router.addresses.grpc),
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        async with asyncio.timeout(WAIT_S):
            out, _ = await process.communicate()
    assert process.returncode == 0
    assert "replica-0" in out.decode()
