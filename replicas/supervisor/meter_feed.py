"""Where a supervisor's meter readings come from: the agents of its group's hosts, or a fake of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from replicas.config import ReplicaConfig
from replicas.energy.agent_client import watch_readings
from replicas.energy.ask_pipe import Asker
from replicas.energy.meter import Reading
from replicas.energy.replay import StepPowerMeter
from replicas.request import StepRecord
from replicas.supervisor.feed import MeterFeed
from replicas.supervisor.rank_group import RankProcess
from replicas.supervisor.sum_feed import SumFeed

FAKE_POLL_S = 0.03
GPU_UUID_PREFIX = "GPU-"

logger = logging.getLogger(__name__)


class FakeFeed:
    """The null engine's meter: it knows only what the steps tell it."""

    metrics_addresses = ()

    def __init__(self, *, power_w: float, idle_power_w: float) -> None:
        self._meter = StepPowerMeter(power_w=power_w, idle_power_w=idle_power_w)

    def note_step(self, record: StepRecord) -> None:
        self._meter.note_step(record.start_ns, record.end_ns)

    def want_edge(self) -> None:
        """They come often enough."""

    async def readings(self) -> AsyncGenerator[Reading, None]:
        while True:
            yield self._meter.read()
            await asyncio.sleep(FAKE_POLL_S)


class AgentFeed:
    """The meters of one host, watched by its energy agent for the devices and processes of the group there.

    `is_far`: it is not this host.
    """

    def __init__(
        self, *, address: str, group: str, ranks: Sequence[RankProcess], meter: str, is_far: bool = False
    ) -> None:
        self.metrics_addresses: tuple[str, ...] = ("",)
        self._is_far = is_far
        self._address = address
        self._group = group
        self._gpu_uuids = [rank.device for rank in ranks if rank.device.startswith(GPU_UUID_PREFIX)]
        self._pids = [rank.pid for rank in ranks]
        self._meter = meter
        self._asker = Asker()

    def note_step(self, record: StepRecord) -> None:
        """Real meters see the step themselves, and are read more often while there are any."""
        self._asker.note_running()

    def want_edge(self) -> None:
        self._asker.ask()

    async def readings(self) -> AsyncGenerator[Reading, None]:
        watch = watch_readings(
            self._address,
            group=self._group,
            gpu_uuids=self._gpu_uuids,
            pids=self._pids,
            meter=self._meter,
            is_far=self._is_far,
            asker=self._asker,
            on_metrics_address=self._note_metrics_address,
            on_state=self._note_state,
        )
        try:
            async with aclosing(watch) as readings:
                async for reading in readings:
                    yield reading
        finally:
            self._asker.close()

    def _note_metrics_address(self, address: str) -> None:
        self.metrics_addresses = (address,)

    def _note_state(self, state: str) -> None:
        """While its reads hang, bills stay open; requests are told provisional figures."""
        logger.warning("meter_state group=%s state=%s", self._group, state)


def make_feed(config: ReplicaConfig, *, group: str, ranks: Sequence[RankProcess]) -> MeterFeed | None:
    """None where nothing meters this replica: its energy is unknown."""
    if config.energy_agent:
        return _agent_feed(config, group=group, ranks=ranks)
    if config.source == "null" or config.meter == "fake":
        return FakeFeed(power_w=config.null.power_w, idle_power_w=config.null.idle_power_w)
    return None


def _agent_feed(config: ReplicaConfig, *, group: str, ranks: Sequence[RankProcess]) -> MeterFeed:
    """An agent for each host that has ranks; rank 0 is on this one."""
    hosts: dict[str, list[RankProcess]] = {}
    for rank in ranks:
        hosts.setdefault(rank.node, []).append(rank)
    feeds = [
        AgentFeed(
            address=_far_address(there[0], config) if node else config.energy_agent,
            group=group,
            ranks=there,
            meter=config.meter,
            is_far=bool(node),
        )
        for node, there in hosts.items()
    ]
    return feeds[0] if len(feeds) == 1 else SumFeed(feeds)


def _far_address(rank: RankProcess, config: ReplicaConfig) -> str:
    host = f"[{rank.address}]" if ":" in rank.address else rank.address
    return f"{host}:{config.energy_agent_port}"
