"""Whoever keeps the host's energy agent goes on with other work while Ray does not answer."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.serving import energy_agent
from tests.router_fixture import make_config

WAIT_S = 150.0


async def test_a_slow_ray_holds_no_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config().model_copy(update={"runtime_dir": str(tmp_path)})
    is_asked, may_answer = threading.Event(), threading.Event()
    watched: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(address: str, *_: object) -> None:
        watched.set_result(address)
        await asyncio.Event().wait()

    def find(address: str, node_id: str) -> Any:
        is_asked.set()
        assert may_answer.wait(WAIT_S), "the event loop waits for Ray"
        return SimpleNamespace(run=SimpleNamespace(remote=run))

    monkeypatch.setattr(energy_agent, "_find_or_make", find)
    keeping = asyncio.create_task(energy_agent.keep_energy_agent(config, "c0ffee"))
    async with asyncio.timeout(WAIT_S):
        assert await asyncio.to_thread(is_asked.wait, WAIT_S)
        may_answer.set()
        assert await watched == f"unix:{tmp_path}/energy-c0ffee.sock"
    keeping.cancel()
