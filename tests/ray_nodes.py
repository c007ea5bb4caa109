"""A Ray of several nodes on this machine: each is a raylet with processes of its own.

Its GCS keeps what it knows in a store, as that of a production cluster does, so that it can come back. Ray
reads its environment when it is imported, so all of it lives in a child (`python -m tests.ray_nodes FOLDER`)
that is told what to do line by line.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

NODE_CPUS = 2
"""Room for one replica of one rank."""
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
"""A dead node is noticed in seconds; Ray's own defaults take up to a minute."""


class RayNodes:
    """The nodes from outside. `environment` is what drivers need to join."""

    def __init__(self, folder: Path, *, head_cpus: int) -> None:
        (folder / "gcs").mkdir()
        (folder / "token").write_text(secrets.token_hex(32))
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        store = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "gcs")}
        with (folder / "nodes.log").open("wb") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "tests.ray_nodes", str(folder / "ray"), str(head_cpus)],
                env=os.environ | HEALTH | store | self.environment,
                cwd=Path(__file__).resolve().parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.address = self._read()

    def tell(self, command: str) -> None:
        """`add [ADDRESS]`; `lose PID`: the node of this process; `stop-gcs`; `start-gcs`. Returns after."""
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        assert self._read() == "done"

    def _read(self) -> str:
        """What the child says behind whatever Ray prints."""
        for line in self.process.stdout:
            if line.startswith("# "):
                return str(line[2:].strip())
        raise AssertionError("the nodes ended")


@contextmanager
def ray_nodes(folder: Path, *, head_cpus: int = 0) -> Iterator[RayNodes]:
    """A head and no other node yet. Ends with the block, whatever became of it."""
    nodes = RayNodes(folder, head_cpus=head_cpus)
    try:
        yield nodes
    finally:
        kill_family(nodes.process.pid)


def kill_family(pid: int) -> None:
    """The process and all below it, at once."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family, timeout=10)


def main(folder: Path, head_cpus: int) -> None:
    from ray._private import utils
    from ray.cluster_utils import Cluster

    # It would make this the cluster that other programs of this user join.
    utils.write_ray_address = lambda *_: None
    head = {
        "num_cpus": head_cpus,
        "include_dashboard": False,
        "temp_dir": str(folder),
        "gcs_server_port": free_port(),
    }
    cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args=head)

    def lose(pid: int) -> None:
        above = {parent.pid for parent in psutil.Process(pid).parents()}
        node = next(node for node in cluster.worker_nodes if raylet_pid(node) in above)
        kill_family(raylet_pid(node))
        cluster.remove_node(node, allow_graceful=False)

    def add(*address: str) -> None:
        cluster.add_node(num_cpus=NODE_CPUS, **({"node_ip_address": address[0]} if address else {}))

    commands: dict[str, Callable[..., Any]] = {
        "add": add,
        "lose": lambda pid: lose(int(pid)),
        "stop-gcs": lambda: cluster.head_node.kill_gcs_server(),
        "start-gcs": lambda: cluster.head_node.start_gcs_server(),
    }
    say(cluster.gcs_address)
    for line in sys.stdin:
        name, *arguments = line.split()
        commands[name](*arguments)
        say("done")


def raylet_pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def say(text: str) -> None:
    print(f"# {text}", flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
