"""Ray under `up`: a private one that it owns, or a running one that it joins.

The private one announces the logical CPUs of the plan, keeps its files under the run folder, has no
dashboard and no HTTP proxy, and ends with this process.
"""

from __future__ import annotations

import logging
import shutil
import socket
from contextlib import suppress

import psutil
import ray
from ray import serve

from cluster.command_error import CommandError
from cluster.config import Config
from cluster.serving.placement import logical_cpus
from cluster.serving.run_folder import RunFolder

NAMESPACE = "wattline"
LEFTOVER_TIMEOUT_S = 5.0
REACH_TIMEOUT_S = 5.0
QUIET_LOGGERS = ("ray", "ray.serve", "ray.data")

logger = logging.getLogger(__name__)


class RaySession:
    """One connection to Ray. `is_owner`: this process started it and ends it."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self._config = config
        self._folder = folder
        self.is_owner = not config.ray.address

    def start(self) -> None:
        """Start or join Ray, and Serve in it. Raises CommandError."""
        if self.is_owner:
            _check_hosts(self._config)
            self._start_own()
        else:
            self._join()
        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled")

    def _start_own(self) -> None:
        shutil.rmtree(self._folder.ray_dir, ignore_errors=True)
        try:
            ray.init(
                address="local",
                num_cpus=logical_cpus(self._config),
                object_store_memory=self._config.ray.object_store_mib * 2**20,
                include_dashboard=False,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(self._folder.ray_dir),
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:  # Ray raises no narrower one.
            reason = str(error).strip().split("\n")[0]
            raise CommandError(
                f"Ray did not start: {reason} Its logs: {self._folder.ray_dir}/session_latest/logs"
            ) from error

    def _join(self) -> None:
        address = self._config.ray.address
        _check_reachable(address)
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CommandError(
                f"ray.address: no Ray at {address!r} ({reason}); start one, or leave the key out to own one"
            ) from error

    @property
    def address(self) -> str:
        """Where other drivers join."""
        return str(ray.get_runtime_context().gcs_address)

    def stop(self) -> None:
        """Leave Ray; end it if it is ours, with whatever it left behind."""
        children = psutil.Process().children(recursive=True) if self.is_owner else []
        ray.shutdown()
        if self.is_owner:
            _, alive = psutil.wait_procs(children, LEFTOVER_TIMEOUT_S)
            _kill(alive)
        shutil.rmtree(self._folder.shared_dir, ignore_errors=True)


def _check_hosts(config: Config) -> None:
    """A Ray of our own is one node, where a group over hosts would wait for ever."""
    for index, section in enumerate(config.models):
        if section.parallel.hosts > 1:
            raise CommandError(
                f"models[{index}].parallel.hosts is {section.parallel.hosts}, but the Ray of `up` is one "
                "node; set ray.address to a Ray that has as many, or hosts to 1"
            )


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes. `auto` is looked up by Ray."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        raise CommandError(
            f"ray.address: nothing listens on {address!r} ({error.strerror or error}); start a Ray there, "
            "or leave the key out to own one"
        ) from error


def node_address() -> str:
    """The address of this host that other nodes of the Ray cluster reach."""
    return str(ray.util.get_node_ip_address())


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            logger.warning("leftover_killed pid=%d name=%s", process.pid, process.name())
            process.kill()
    psutil.wait_procs(processes, LEFTOVER_TIMEOUT_S)
