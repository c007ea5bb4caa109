"""The energy agents of hosts as Ray actors, each made by the first replica with ranks there, shared by all.

Detached and restarted by Ray, so it outlives any one replica; it ends a minute after the last watcher left.
Its addresses are known before it runs: nobody waits for it, and without it energy is unknown, not wrong.
Where a model spans hosts it listens for supervisors of other nodes, too, in plain text as ranks do.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import Config, TelemetrySection
from cluster.serving.run_folder import RunFolder
from replicas.config import MetricsAccess
from replicas.energy.agent import EnergyAgent

NAMESPACE = "wattline"
RETRY_S = 1.0
NODE_ID_CHARS = 12
WILDCARDS = ("0.0.0.0", "::")

logger = logging.getLogger(__name__)


class EnergyAgentHost:
    """The actor: one agent on one socket, until nobody watches.

    Its one call holds the main thread, which Ray otherwise wakes every 10 ms to look for signals. It must not
    be a coroutine, nor any other method: Ray would run a loop beside the main thread.
    """

    def run(self, address: str, config: Config) -> None:
        """Be the agent. A second caller waits behind the first; both fail with the process."""
        RunFolder(Path(config.runtime_dir)).prepare()
        asyncio.run(_serve(address, config))
        # Leaving by an exit code would count as a crash, and Ray would start the actor again.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


async def _serve(address: str, config: Config) -> None:
    energy = config.energy
    agent = EnergyAgent(
        poll_s=energy.poll_ms / 1e3,
        cpu_static_w=energy.cpu_static_w,
        cpu_core_w=energy.cpu_core_w,
        host_meter=energy.host_meter,
    )
    agent.serve_metrics(metrics_access(config.telemetry), port=config.telemetry.agent_metrics_port)
    await agent.start(address, *_far_addresses(config))
    await agent.serve_until_unused()


def _far_addresses(config: Config) -> list[str]:
    """Where supervisors on other nodes reach it, if there may be any."""
    if all(section.parallel.hosts == 1 for section in config.models):
        return []
    host = ray.util.get_node_ip_address()
    return [f"{f'[{host}]' if ':' in host else host}:{config.energy.agent_port}"]


def energy_agent_address(runtime_dir: Path, node_id: str = "") -> str:
    """Where the agent of a node (empty: this one) listens for those on its host."""
    node_id = node_id or ray.get_runtime_context().get_node_id()
    return f"unix:{runtime_dir}/energy-{node_id[:NODE_ID_CHARS]}.sock"


def metrics_access(telemetry: TelemetrySection) -> MetricsAccess:
    """Where the processes of this node show their metrics."""
    host, tls = telemetry.metrics_host, telemetry.metrics_tls
    return MetricsAccess(
        host=host,
        announced_host=ray.util.get_node_ip_address() if host in WILDCARDS else "",
        cert=tls.cert,
        key=tls.key,
        client_ca=tls.client_ca,
    )


async def keep_energy_agent(config: Config, node_id: str = "") -> None:
    """See to it that a node (empty: this one) has its agent, for as long as this coroutine runs.

    Ray asks its control plane for the actor and waits: aside, because links run on this event loop.
    """
    node_id = node_id or ray.get_runtime_context().get_node_id()
    address = energy_agent_address(Path(config.runtime_dir), node_id)
    while True:
        try:
            agent = await asyncio.to_thread(_find_or_make, address, node_id)
            await agent.run.remote(address, config)
        except (RayError, ValueError) as error:
            logger.warning("energy_agent_lost address=%s error=%s", address, type(error).__name__)
        await asyncio.sleep(RETRY_S)


def _find_or_make(address: str, node_id: str) -> Any:
    return (
        ray.remote(EnergyAgentHost)
        .options(
            name=f"energy-agent-{address}-{node_id}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
        )
        .remote()
    )
