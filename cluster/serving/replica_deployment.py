"""One Serve replica: a supervisor with its ranks, in one placement group.

Serve calls the constructor, `check_health` and `__del__`, all on the event loop that gRPC uses. The group is
one failure domain: when it is lost this process leaves at once, and Serve makes a new replica.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from ray import serve

from cluster.config import Config, LinkTlsSection, ModelSection
from cluster.serving.ending_report import ask_why_it_ends
from cluster.serving.energy_agent import energy_agent_address, keep_energy_agent, metrics_access
from cluster.serving.loading_note import LoadingNote
from cluster.serving.placement import place
from cluster.serving.ray_ranks import RayRankGroup
from cluster.serving.run_folder import RunFolder
from cluster.sources import resolve_source
from replicas.config import LinkCredentials, ReplicaConfig, lookahead_on
from replicas.long_lived import spare_the_collector
from replicas.supervisor.rank_group import RankProcess
from replicas.supervisor.supervisor import Supervisor

NOTE_PERIOD_S = 0.25

logger = logging.getLogger(__name__)


class ReplicaDeployment:
    """What Serve holds. `device` is the resolved one, cpu or cuda."""

    _supervisor: Supervisor | None = None
    """None until the constructor got that far; Serve may call `__del__` before."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it.
        self, *, config: Config, model: str, device: str
    ) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        section = config.model(model)
        folder = RunFolder(Path(config.runtime_dir))
        folder.prepare()
        folder.prepare_shared()
        find_source = partial(resolve_source, section.source, revision=section.revision)
        source = section.source if section.is_null else str(await asyncio.to_thread(find_source))
        told = replica_config(config, section, folder, source=source, device=device)
        self._application = serve.get_replica_context().app_name
        agents = _EnergyAgents(config if told.energy_agent else None)
        self._agents = agents
        agents.keep()
        self._supervisor = Supervisor(
            told,
            RayRankGroup(
                place(section, device=device),
                find_source=None if section.is_null else find_source,
                on_placed=agents.keep_far,
            ),
            leave,
        )
        spare_the_collector()
        noting = asyncio.create_task(_note_loading(self._supervisor, LoadingNote(folder.path, model)))
        try:
            await self._supervisor.start()
        finally:
            noting.cancel()
            with suppress(asyncio.CancelledError):
                await noting

    async def check_health(self) -> None:
        """Raises RankLost when the group is lost. The exit of this process usually comes first."""
        assert self._supervisor, "Serve asks after the constructor"
        self._supervisor.check_health()

    async def __del__(self) -> None:
        """Serve awaits this before it ends a replica: streams under way finish, within `limits.drain_s`."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        await supervisor.drain(await ask_why_it_ends(self._application))
        await supervisor.stop()
        self._agents.close()


def leave(reason: str) -> None:
    """The group is lost and its processes are gone: so is this one, and Serve sees it at its next look."""
    logger.error("replica_left reason=%s", reason)
    logging.shutdown()
    os._exit(1)


def replica_config(
    config: Config, section: ModelSection, folder: RunFolder, *, source: str, device: str
) -> ReplicaConfig:
    """What the supervisor is told, on this node."""
    router = config.router
    needs_agent = not section.is_null and config.energy.meter != "fake"
    return ReplicaConfig(
        model=section.name,
        source=source,
        replica_id=f"{section.name}#{serve.get_replica_context().replica_id.unique_id}",
        routers=router.link_addresses or (f"{router.link_host}:{router.link_port}",),
        link_credentials=_link_credentials(router.link_tls),
        parallel=section.parallel.to_parallel(),
        limits=section.limits.to_engine(lookahead=lookahead_on(device)),
        null=section.null_engine.to_null(),
        device=device,
        dtype=section.dtype,
        threads_per_rank=section.threads_per_rank,
        kernels=section.kernels,
        attention=section.attention,
        quantization=section.quantization,
        runtime_dir=str(folder.path),
        shared_dir=str(folder.shared_dir),
        energy_agent=energy_agent_address(folder.path) if needs_agent else "",
        energy_agent_port=config.energy.agent_port,
        meter=config.energy.meter,
        metrics=metrics_access(config.telemetry),
        drain_s=section.limits.drain_s,
        ready_timeout_s=section.limits.ready_timeout_s,
    )


def _link_credentials(tls: LinkTlsSection) -> LinkCredentials | None:
    if not tls.is_on:
        return None
    return LinkCredentials(
        ca=tls.ca,
        cert=tls.replica_cert or tls.cert,
        key=tls.replica_key or tls.key,
        server_name=tls.server_name,
    )


class _EnergyAgents:
    """Of the nodes that this replica has ranks on. `config` None: it needs none."""

    def __init__(self, config: Config | None) -> None:
        self._config = config
        self._tasks: list[asyncio.Task[None]] = []

    def keep(self, node_id: str = "") -> None:
        """Empty: this node's."""
        if self._config is not None:
            self._tasks.append(asyncio.create_task(keep_energy_agent(self._config, node_id)))

    def keep_far(self, ranks: Sequence[RankProcess]) -> None:
        for node_id in sorted({rank.node for rank in ranks if rank.node}):
            self.keep(node_id)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


async def _note_loading(supervisor: Supervisor, note: LoadingNote) -> None:
    """Write down how far the ranks are, for the screen of `up`, until cancelled."""
    try:
        while True:
            note.write([(one.stage, one.done, one.total) for one in supervisor.progress])
            await asyncio.sleep(NOTE_PERIOD_S)
    finally:
        note.remove()
