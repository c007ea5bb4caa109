"""The whole system on this machine with the null engine: one `wattline up`, and what is done to it.

The tests share one Ray and run in order; the last one ends it and looks for leftovers.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.client import Ask, CallError
from cluster.replies import Delta, Final
from cluster.serving.ending_report import UNKNOWN
from tests.running_up import NUM_STREAMS, Running, Streaming, running_up, wait_gone, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

RECOVERY_TIMEOUT_S = 150.0
COMMAND_TIMEOUT_S = 120.0

logger = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_up(make_config) as up:
        yield up


def make_config(folder: Path, **router: object) -> dict[str, object]:
    ports = {"grpc_port": 0, "http_port": 0, "link_port": 0}
    return {
        "models": [
            {"name": "solo", "source": "null", "parallel": {"tensor": 2}, "limits": {"drain_s": 8}},
            {
                "name": "pair",
                "source": "null",
                "replicas": {"min": 2, "max": 2},
                "balancing": "least_loaded",
                "limits": {"drain_s": 12},
                "null_engine": {"step_ms": 10},
                "cpus_per_rank": 0.5,
            },
        ],
        "router": ports | router,
        "energy": {"meter": "fake"},
        "runtime_dir": str(folder),
    }


def test_every_model_streams_tokens_and_then_their_joules(running: Running) -> None:
    for model in ("solo", "pair"):
        *deltas, final = running.client.generate(
            model, "hello", Ask(max_tokens=12, temperature=0.0, energy_wait_ms=1000)
        )
        assert all(isinstance(delta, Delta) for delta in deltas)
        assert isinstance(final, Final)
        assert final.usage.completion_tokens == 12
        energy = running.final_energy(final)
        assert energy.source == "fake"
        assert energy.total_j is not None
        assert energy.total_j > 0
        assert len(final.trace_id) == 32


def test_a_replica_is_two_rank_processes_on_one_event_loop_of_its_supervisor(running: Running) -> None:
    replica = running.replica("solo")
    assert replica.tensor_parallel == 2
    names = {psutil.Process(rank.pid).name() for rank in replica.ranks}
    assert names == {"ray::RankHost.run"}
    environment = psutil.Process(replica.supervisor_pid).environ()
    assert environment["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == "0"
    assert environment["RAY_AUTH_MODE"] == "token"


def test_a_second_up_on_the_same_ports_is_refused_with_port_and_key(running: Running, tmp_path: Path) -> None:
    port = int(running.state.grpc.rpartition(":")[2])
    with tempfile.TemporaryDirectory(prefix="wl-", dir="/tmp") as other:
        config_path = tmp_path / "second.yaml"
        config_path.write_text(yaml.safe_dump(make_config(Path(other), grpc_port=port)))
        command = [sys.executable, "-m", "cluster.cli", "up", "--file", str(config_path)]
        refused = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    assert refused.returncode == 1
    assert f"router.grpc_port: port {port} on 127.0.0.1 is in use" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_second_up_in_the_same_folder_is_refused_with_the_process(running: Running) -> None:
    command = [sys.executable, "-m", "cluster.cli", "up", "--file", str(running.config_path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    assert refused.returncode == 1
    assert f"process {running.process.pid} already runs `wattline up`" in refused.stderr


def test_a_killed_router_comes_back_and_no_replica_is_restarted(running: Running) -> None:
    before = {
        replica.replica_id: replica for model in running.client.status().models for replica in model.replicas
    }
    (router,) = (child for child in running.process.children() if "cluster.edge" in " ".join(child.cmdline()))
    router.kill()

    def is_back() -> bool:
        try:
            return sum(model.num_ready for model in running.client.status(timeout_s=1.0).models) == 3
        except CallError:
            return False

    recovery_s = wait_until(is_back, RECOVERY_TIMEOUT_S, "the router's return")
    logger.info("measured router_recovery_s=%.1f", recovery_s)
    after = {
        replica.replica_id: replica for model in running.client.status().models for replica in model.replicas
    }
    assert {name: (one.supervisor_pid, one.ranks) for name, one in after.items()} == {
        name: (one.supervisor_pid, one.ranks) for name, one in before.items()
    }
    assert isinstance(list(running.client.generate("solo", "x", Ask(max_tokens=2)))[-1], Final)


def test_a_killed_rank_ends_its_streams_and_serve_replaces_the_replica(running: Running) -> None:
    lost = running.replica("solo")
    gone = [psutil.Process(pid) for pid in (lost.supervisor_pid, *(rank.pid for rank in lost.ranks))]
    stream = running.client.generate("solo", "hello", Ask(max_tokens=4000, resume=False))
    next(stream)
    os.kill(lost.ranks[1].pid, signal.SIGKILL)
    with pytest.raises(CallError) as caught:
        list(stream)
    assert caught.value.code == "UNAVAILABLE"
    assert "Traceback" not in str(caught.value)
    assert str(lost.ranks[1].pid) not in str(caught.value)

    def is_serving() -> bool:
        try:
            return isinstance(list(running.client.generate("solo", "x", Ask(max_tokens=2)))[-1], Final)
        except CallError as error:
            assert error.code == "UNAVAILABLE"
            return False

    recovery_s = wait_until(is_serving, RECOVERY_TIMEOUT_S, "the replica's return")
    logger.info("measured rank_kill_recovery_s=%.1f", recovery_s)
    replacement = running.replica("solo")
    assert replacement.replica_id != lost.replica_id
    wait_gone(gone)


REDEPLOY = """
import sys
from pathlib import Path
import ray
from cluster.config import load_config
from cluster.serving.deployments import Deployments
config = load_config(Path(sys.argv[1]))
ray.init(address=sys.argv[2], namespace="wattline", log_to_driver=False)
router = config.router.model_copy(update={"link_addresses": (sys.argv[3],)})
pair = (config.model("pair"),)
Deployments(config.model_copy(update={"router": router, "models": pair})).deploy()
"""


def redeploy_pair(running: Running) -> None:
    """What a chart or a second driver does: hand the same application to Serve again."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(running.folder.token_path),
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    }
    command = [
        sys.executable,
        "-c",
        REDEPLOY,
        str(running.config_path),
        running.state.ray,
        running.state.link,
    ]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=COMMAND_TIMEOUT_S)


def test_a_rolling_redeploy_breaks_no_stream(running: Running) -> None:
    before = {replica.replica_id for replica in running.model("pair").replicas}
    with Streaming(running.client, "pair") as streaming:
        redeploy_pair(running)

        def is_replaced() -> bool:
            now = {
                replica.replica_id for replica in running.model("pair").replicas if replica.state == "ready"
            }
            return len(now) == 2 and not now & before

        rolling_s = wait_until(is_replaced, RECOVERY_TIMEOUT_S, "two new replicas")
    logger.info("measured rolling_redeploy_s=%.1f streams=%d", rolling_s, streaming.num_finished)
    assert streaming.failures == []
    assert streaming.num_finished >= NUM_STREAMS
    reasons = {event.reason for event in running.client.status().events if event.kind == "draining"}
    assert reasons and reasons <= {"another configuration was deployed", UNKNOWN}


def test_down_leaves_no_process_no_shared_memory_and_no_port(running: Running) -> None:
    family = running.process.children(recursive=True)
    assert len(family) > 8
    command = [sys.executable, "-m", "cluster.cli", "down", "--file", str(running.config_path)]
    start_s = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    logger.info("measured down_s=%.1f", time.monotonic() - start_s)
    assert ended.returncode == 0, ended.stderr
    assert running.process.wait(timeout=COMMAND_TIMEOUT_S) == 0
    wait_gone(family)
    assert not running.folder.shared_dir.exists()
    assert list(running.folder.path.glob("*.sock")) == []
    assert not running.folder.token_path.exists()
    with pytest.raises(CallError, match="no router at"):
        running.client.status(timeout_s=1.0)
