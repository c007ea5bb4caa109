"""Where the ranks of a replica go: bundles, Serve options and the plan of a whole configuration. Pure.

One bundle per rank. Bundle 0 also holds the supervisor, so that it shares a host with rank 0; the whole
group stays on one node. CPUs are logical: they come from the plan, not from the machine.
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

    def bundles(self) -> list[dict[str, float]]:
        """One per rank, rank 0 first. Example: 2 ranks on GPUs, `[{CPU: 2, GPU: 1}, {CPU: 1, GPU: 1}]`."""
        gpu = {"GPU": float(self.gpus_per_rank)} if self.gpus_per_rank else {}
        first = {"CPU": SUPERVISOR_CPUS + self.cpus_per_rank} | gpu
        return [first] + [{"CPU": self.cpus_per_rank} | gpu for _ in range(self.num_ranks - 1)]

    @property
    def num_cpus(self) -> float:
        return SUPERVISOR_CPUS + self.num_ranks * self.cpus_per_rank

    @property
    def num_gpus(self) -> int:
        return self.num_ranks * self.gpus_per_rank

    def describe(self) -> str:
        """For a person waiting: what must be free on one node."""
        gpus = f" and {self.num_gpus} GPU" if self.num_gpus else ""
        return f"{self.num_cpus:g} CPU{gpus} on one node"


def place(section: ModelSection, *, device: str) -> Placement:
    """`device` is the resolved one: cpu or cuda."""
    return Placement(
        num_ranks=section.parallel.to_parallel().num_ranks,
        cpus_per_rank=section.cpus_per_rank,
        gpus_per_rank=1 if device == "cuda" else 0,
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
    """Options of the Serve deployment of a model: one replica is one group of ranks on one node.

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
        "placement_group_strategy": "STRICT_PACK",
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": SHUTDOWN_POLL_S,
        "graceful_shutdown_timeout_s": section.limits.drain_s,
        "ray_actor_options": actor_options,
    }
