"""A group over two hosts that loses a rank of the other host, or a host. Cases 1, 3 and 10 over hosts.

Two nodes on this machine, and one replica that needs both. The tests share them and run in order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from cluster.replies import ReplicaState
from tests.ray_nodes import RayNodes, ray_nodes
from tests.running_up import Running, Streaming, running_up, wait_gone, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

MODEL = "wide"
NUM_HOSTS = 2
WAIT_S = 120.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with TemporaryDirectory(prefix="wl-", dir="/tmp") as name, ray_nodes(Path(name)) as started:
        for _ in range(NUM_HOSTS):
            started.tell("add")
        yield started


@pytest.fixture(scope="module")
def running(nodes: RayNodes) -> Iterator[Running]:
    def make_config(folder: Path) -> dict[str, object]:
        model = {
            "name": MODEL,
            "source": "null",
            "parallel": {"tensor": NUM_HOSTS, "hosts": NUM_HOSTS},
            "null_engine": {"step_ms": 10},
            "cpus_per_rank": 0.5,
        }
        return {
            "models": [model],
            "router": {"grpc_port": 0, "http_port": 0, "link_port": 0, "failover": {"wait_s": WAIT_S}},
            "energy": {"meter": "fake"},
            "ray": {"address": nodes.address},
            "runtime_dir": str(folder),
        }

    with running_up(make_config, nodes.environment) as up:
        yield up


def family_of(replica: ReplicaState) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in (replica.supervisor_pid, *(rank.pid for rank in replica.ranks))]


def until_ready(running: Running) -> None:
    wait_until(lambda: running.num_ready(MODEL) == 1, WAIT_S, "another group")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_of_the_other_host_is_lost(running: Running, how: signal.Signals) -> None:
    """Promise: nothing is left of its group on any host; streams wait for the next one, and lose nothing."""
    lost = running.replica(MODEL)
    family = family_of(lost)
    with Streaming(running.client, MODEL) as streaming:
        streaming.wait_for_new()
        os.kill(lost.ranks[1].pid, how)
        wait_gone(family)
        until_ready(running)
        streaming.wait_for_new()
    assert streaming.failures == []


def supervisor_of(replica: ReplicaState) -> int:
    return replica.supervisor_pid


def far_rank_of(replica: ReplicaState) -> int:
    return replica.ranks[1].pid


@pytest.mark.parametrize("process_of", [far_rank_of, supervisor_of])
def test_a_host_is_lost(running: Running, nodes: RayNodes, process_of: Callable[[ReplicaState], int]) -> None:
    """Promise: what the other host has of the group ends too; what is missing is said; streams go on."""
    lost = running.replica(MODEL)
    family = family_of(lost)
    with Streaming(running.client, MODEL) as streaming:
        nodes.tell(f"lose {process_of(lost)}")
        wait_gone(family)
        reason = "Ray has no room yet: a replica needs 1.5 CPU on one node, 0.5 CPU on another"
        wait_until(lambda: reason in running.log, WAIT_S, "a reason")
        nodes.tell("add")
        until_ready(running)
        streaming.wait_for_new()
    assert streaming.failures == []
