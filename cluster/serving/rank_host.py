"""The actor that is one rank: a process in its bundle, with its device. Called by `ray_ranks.py`.

What it is asked before `run` is what only its own node knows: who it is there, where the checkpoint is, and
which ports are free.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray

from cluster.serving.gpu_names import gpu_uuid
from cluster.serving.process_families import Started, this_process
from replicas.config import Rendezvous, rank_config_from_json
from replicas.parallel.rendezvous import open_rendezvous
from replicas.rank.main import run_rank
from replicas.supervisor.rank_group import THREAD_VARIABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """What the process of a rank says of itself before it is told anything. `gpu` is empty on CPU."""

    process: Started
    gpu: str
    log_path: str
    node: str
    """Ray's id of it."""
    address: str
    """Of the node, for other nodes."""

    @property
    def pid(self) -> int:
        return self.process[0]


class RankHost:
    """The actor. `run` is its last call."""

    def introduce(self) -> Introduction:
        gpu_ids = ray.get_gpu_ids()
        return Introduction(
            process=this_process(),
            gpu=gpu_uuid(str(gpu_ids[0])) if gpu_ids else "",
            log_path=str(Path("/proc/self/fd/2").readlink()),
            node=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
        )

    def find_source(self, find: Callable[[], Path]) -> str:
        """The folder of the checkpoint on this node."""
        return str(find())

    def open_rendezvous(self) -> Rendezvous:
        """Of rank 0, for a group over hosts: the listeners are this process's own."""
        return open_rendezvous(ray.util.get_node_ip_address())

    def run(self, config_json: str, host_gpus: tuple[str, ...]) -> None:
        """Be the rank until the group ends. It sees all GPUs of its group on its host, in rank order."""
        config = rank_config_from_json(config_json)
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(config.threads)))
        if host_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(host_gpus)
        run_rank(config)
