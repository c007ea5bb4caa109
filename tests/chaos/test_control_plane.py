"""Ray's own parts die: the Serve controller, the GCS, a node. Cases 8 to 10 of the fault matrix.

Three nodes on this machine, joined by one `wattline up`. The tests share them and run in order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from tests.ray_nodes import RayNodes, ray_nodes
from tests.running_up import Running, Streaming, running_up, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

MODEL = "pair"
NUM_REPLICAS = 2
WAIT_S = 120.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with TemporaryDirectory(prefix="wl-", dir="/tmp") as name, ray_nodes(Path(name)) as started:
        for _ in range(NUM_REPLICAS):
            started.tell("add")
        yield started


@pytest.fixture(scope="module")
def running(nodes: RayNodes) -> Iterator[Running]:
    def make_config(folder: Path) -> dict[str, object]:
        model = {
            "name": MODEL,
            "source": "null",
            "replicas": {"min": NUM_REPLICAS, "max": NUM_REPLICAS},
            "balancing": "least_loaded",
            "null_engine": {"step_ms": 10},
            "cpus_per_rank": 0.5,
        }
        return {
            "models": [model],
            "router": {"grpc_port": 0, "http_port": 0, "link_port": 0},
            "energy": {"meter": "fake"},
            "ray": {"address": nodes.address},
            "runtime_dir": str(folder),
        }

    with running_up(make_config, nodes.environment) as up:
        yield up


def kill_controller(nodes: RayNodes) -> None:
    family = nodes.process.children(recursive=True)
    (controller,) = (one for one in family if one.name().startswith("ray::ServeController"))
    controller.kill()
    psutil.wait_procs([controller])


def until_whole(running: Running) -> None:
    wait_until(lambda: running.num_ready(MODEL) == NUM_REPLICAS, WAIT_S, "all replicas")


def lose_a_rank(running: Running) -> None:
    """The other replica takes its streams, and Serve makes a new one."""
    os.kill(running.model(MODEL).replicas[0].ranks[0].pid, signal.SIGKILL)
    wait_until(lambda: running.num_ready(MODEL) < NUM_REPLICAS, WAIT_S, "the loss of a replica")
    until_whole(running)


def test_the_controller_is_killed(running: Running, nodes: RayNodes) -> None:
    """Case 8. Promise: streams and admission do not notice; the next controller replaces replicas again."""
    with Streaming(running.client, MODEL) as streaming:
        kill_controller(nodes)
        streaming.wait_for_new()
        lose_a_rank(running)
        streaming.wait_for_new()
    assert streaming.failures == []


def test_the_gcs_is_killed_and_comes_back(running: Running, nodes: RayNodes) -> None:
    """Case 9. Promise: streams and admission do not notice; replicas are replaced once it is back."""
    with Streaming(running.client, MODEL) as streaming:
        nodes.tell("stop-gcs")
        streaming.wait_for_new()
        nodes.tell("start-gcs")
        lose_a_rank(running)
        streaming.wait_for_new()
    assert streaming.failures == []


def test_a_node_is_lost(running: Running, nodes: RayNodes) -> None:
    """Case 10. Promise: its streams go on elsewhere; the lack of room is said, and ends with a new node."""
    with Streaming(running.client, MODEL) as streaming:
        nodes.tell(f"lose {running.model(MODEL).replicas[0].supervisor_pid}")
        wait_until(lambda: running.num_ready(MODEL) < NUM_REPLICAS, WAIT_S, "the loss of a replica")
        streaming.wait_for_new()
        wait_until(lambda: "Ray has no room yet: a replica needs 1.5 CPU" in running.log, WAIT_S, "a reason")
        nodes.tell("add")
        until_whole(running)
        streaming.wait_for_new()
    assert streaming.failures == []
