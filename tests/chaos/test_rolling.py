"""New routers under load, as an operator makes them, by `wattline roll`. Case 20 of the fault matrix."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.client import Ask, Client
from cluster.replies import Delta, Final
from replicas.config import NullEngineConfig
from replicas.rank.null_runner import null_continuation
from tests.running_up import STREAM_PROMPT, Running, Streaming, running_up

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(300)]

MODEL = "solo"
NUM_ROUTERS = 2
LONG = 600
ROLL_TIMEOUT_S = 120.0


@pytest.fixture
def running() -> Iterator[Running]:
    def make_config(folder: Path) -> dict[str, object]:
        return {
            "models": [{"name": MODEL, "source": "null", "null_engine": {"step_ms": 10}}],
            "router": {"grpc_port": 0, "http_port": 0, "link_port": 0, "processes": NUM_ROUTERS},
            "energy": {"meter": "fake"},
            "runtime_dir": str(folder),
        }

    with running_up(make_config) as up:
        yield up


def long_answer(address: str) -> tuple[int, ...]:
    """The tokens of a stream at one router, which must not move: it would say so."""
    ask = Ask(max_tokens=LONG, temperature=0.0, ignore_eos=True, resume=False)
    with Client(address) as client:
        *deltas, final = client.generate(MODEL, STREAM_PROMPT, ask)
    assert isinstance(final, Final)
    return tuple(token for delta in deltas if isinstance(delta, Delta) for token in delta.token_ids)


def test_a_roll_loses_no_stream_of_either_router(running: Running) -> None:
    """Promise: streams under way end where they are, new ones find a router, and the command says when."""
    before = running.folder.router_pids()
    sockets = [f"unix:{running.folder.router_socket(index)}" for index in range(NUM_ROUTERS)]
    with ThreadPoolExecutor() as threads, Streaming(running.client, MODEL) as streaming:
        under_way = [threads.submit(long_answer, address) for address in sockets]
        streaming.wait_for_new()
        command = [sys.executable, "-m", "cluster.cli", "roll", "--file", str(running.config_path)]
        rolled = subprocess.run(command, capture_output=True, text=True, timeout=ROLL_TIMEOUT_S, check=False)
        assert rolled.returncode == 0, rolled.stderr
        streaming.wait_for_new()
        expected = null_continuation(STREAM_PROMPT, LONG, NullEngineConfig())
        assert [each.result() for each in under_way] == [expected] * NUM_ROUTERS
    assert streaming.failures == []
    after = running.folder.router_pids()
    assert rolled.stdout.splitlines()[1:] == [
        f"Router {index}: process {before[index]} is replaced by {after[index]}." for index in before
    ]
    assert set(after) == set(before) and not set(after.values()) & set(before.values())
    assert "Every router is a new one." in running.log
