"""Where the ranks of a replica go: bundles, Serve options and the plan of a whole configuration. Pure.

A group on one host has a bundle per rank, all on one node; a group over hosts a bundle per host, each on a
node of its own. Bundle 0 also holds the supervisor, so that it shares a host with rank 0. CPUs are logical:
they come from the plan, not from the machine.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

from cluster.config import Config, ModelSection

SUPERVISOR_CPUS = 1.0
SPARE_CPUS = 1.0
"""Beyond the bundles, in a Ray of our own: for whatever Ray itself starts."""
MAX_ONGOING_REQUESTS = 4
"""The token path never goes through Serve, so its queues stay short."""
HEALTH_CHECK_PERIOD_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 5.0
SHUTDOWN_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What one replica of a model reserves."""

    num_ranks: int
    cpus_per_rank: float
    gpus_per_rank: int
    num_hosts: int = 1

    def bundles(self) -> list[dict[str, float]]:
        """Rank 0 in the first. Example: 2 ranks on GPUs of one host, `[{CPU: 2, GPU: 1}, {CPU: 1, GPU: 1}]`;
        4 on two hosts, `[{CPU: 3, GPU: 2}, {CPU: 2, GPU: 2}]`."""
        gpu = {"GPU": float(self._ranks_per_bundle * self.gpus_per_rank)} if self.gpus_per_rank else {}
        cpus = self._ranks_per_bundle * self.cpus_per_rank
        num_others = self.num_ranks // self._ranks_per_bundle - 1
        return [{"CPU": SUPERVISOR_CPUS + cpus} | gpu] + [{"CPU": cpus} | gpu for _ in range(num_others)]

    def bundle_of(self, rank: int) -> int:
        return rank // self._ranks_per_bundle

    @property
    def strategy(self) -> str:
        """How Ray lays the bundles out: all on one node, or each on another."""
        return "STRICT_PACK" if self.num_hosts == 1 else "STRICT_SPREAD"

    @property
    def num_cpus(self) -> float:
        return SUPERVISOR_CPUS + self.num_ranks * self.cpus_per_rank

    @property
    def num_gpus(self) -> int:
        return self.num_ranks * self.gpus_per_rank

    def describe(self) -> str:
        """For a person waiting: what must be free, and where."""
        if self.num_hosts == 1:
            return f"{_amount(self.num_cpus, self.num_gpus)} on one node"
        first, other, *_ = self.bundles()
        gpus, num_others = self.num_gpus // self.num_hosts, self.num_hosts - 1
        each = "another" if num_others == 1 else f"each of {num_others} others"
        return f"{_amount(first['CPU'], gpus)} on one node, {_amount(other['CPU'], gpus)} on {each}"

    @property
    def _ranks_per_bundle(self) -> int:
        return 1 if self.num_hosts == 1 else self.num_ranks // self.num_hosts


def _amount(num_cpus: float, num_gpus: int) -> str:
    return f"{num_cpus:g} CPU{f' and {num_gpus} GPU' if num_gpus else ''}"


def place(section: ModelSection, *, device: str) -> Placement:
    """`device` is the resolved one: cpu or cuda."""
    return Placement(
        num_ranks=section.parallel.to_parallel().num_ranks,
        cpus_per_rank=section.cpus_per_rank,
        gpus_per_rank=1 if device == "cuda" else 0,
        num_hosts=section.parallel.hosts,
    )


def resolve_device(section: ModelSection, *, has_gpus: bool) -> str:
    """`auto` takes GPUs where the cluster has any; the null engine never does."""
    if section.is_null:
        return "cpu"
    if section.device != "auto":
        return section.device
    return "cuda" if has_gpus else "cpu"


def logical_cpus(config: Config) -> int:
    """CPUs a Ray of our own announces: room for `replicas.min` of every model and one spare."""
    needed = sum(section.replicas.min * place(section, device="cpu").num_cpus for section in config.models)
    return math.ceil(needed + SPARE_CPUS)


def application_name(model: str) -> str:
    """Serve puts names into file names, so slashes go; a digest keeps two models apart."""
    flat = re.sub(r"[^A-Za-z0-9._-]", "-", model)
    if flat == model:
        return model
    return f"{flat}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def deployment_options(
    section: ModelSection, *, device: str, environment: dict[str, str]
) -> dict[str, object]:
    """Options of the Serve deployment of a model: one replica is one group of ranks.

    `environment` is set for its processes on top of what they inherit.
    """
    placement = place(section, device=device)
    actor_options: dict[str, object] = {"num_cpus": SUPERVISOR_CPUS, "num_gpus": 0}
    if environment:
        actor_options["runtime_env"] = {"env_vars": environment}
    return {
        "name": application_name(section.name),
        "num_replicas": section.replicas.min,
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "placement_group_bundles": placement.bundles(),
        "placement_group_strategy": placement.strategy,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": SHUTDOWN_POLL_S,
        "graceful_shutdown_timeout_s": section.limits.drain_s,
        "ray_actor_options": actor_options,
    }
