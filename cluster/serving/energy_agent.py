"""The energy agent of a host as a Ray actor, made by the first replica there and shared by all.

Detached and restarted by Ray, so it outlives any one replica; it ends a minute after the last watcher left.
Its address is known before it runs: nobody waits for it, and without it energy is unknown, not wrong.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import Config, EnergySection, TelemetrySection
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

    def run(self, address: str, energy: EnergySection, access: MetricsAccess, metrics_port: int) -> None:
        """Be the agent. A second caller waits behind the first; both fail with the process."""
        asyncio.run(_serve(address, energy, access, metrics_port))
        # Leaving by an exit code would count as a crash, and Ray would start the actor again.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


async def _serve(address: str, energy: EnergySection, access: MetricsAccess, metrics_port: int) -> None:
    agent = EnergyAgent(
        poll_s=energy.poll_ms / 1e3,
        cpu_static_w=energy.cpu_static_w,
        cpu_core_w=energy.cpu_core_w,
        host_meter=energy.host_meter,
    )
    agent.serve_metrics(access, port=metrics_port)
    await agent.start(address)
    await agent.serve_until_unused()


def energy_agent_address(runtime_dir: Path) -> str:
    """Where the agent of this node listens."""
    return f"unix:{runtime_dir}/energy-{ray.get_runtime_context().get_node_id()[:NODE_ID_CHARS]}.sock"


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


async def keep_energy_agent(config: Config, runtime_dir: Path) -> None:
    """See to it that this node has its agent, for as long as this coroutine runs."""
    address = energy_agent_address(runtime_dir)
    while True:
        try:
            agent = _find_or_make(address)
            await agent.run.remote(
                address, config.energy, metrics_access(config.telemetry), config.telemetry.agent_metrics_port
            )
        except (RayError, ValueError) as error:
            logger.warning("energy_agent_lost address=%s error=%s", address, type(error).__name__)
        await asyncio.sleep(RETRY_S)


def _find_or_make(address: str) -> Any:
    node_id = ray.get_runtime_context().get_node_id()
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
