"""The energy agents of two hosts, whose clocks differ by days, summed by one supervisor's feed."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import pytest

from replicas.config import ReplicaConfig
from replicas.energy.agent import EnergyAgent
from replicas.errors import MeterUnavailable
from replicas.supervisor.meter_feed import make_feed
from replicas.supervisor.rank_group import RankProcess

WAIT_S = 60.0
DAYS_NS = 3 * 86_400 * 10**9
STATIC_W = 10.0


async def start_agents(near: str) -> tuple[EnergyAgent, EnergyAgent, int]:
    """This host's, and one whose clock runs ahead; and the port of that."""
    agents = (
        EnergyAgent(poll_s=0.01, cpu_static_w=STATIC_W, cpu_core_w=0.0),
        EnergyAgent(
            poll_s=0.01,
            cpu_static_w=STATIC_W,
            cpu_core_w=0.0,
            clock=lambda: time.monotonic_ns() + DAYS_NS,
        ),
    )
    await agents[0].start(near)
    (far,) = await agents[1].start("127.0.0.1:0")
    return *agents, int(far.rpartition(":")[2])


def config_of(address: str, port: int, *, meter: str = "auto") -> ReplicaConfig:
    return ReplicaConfig(
        model="m",
        source="null",
        replica_id="m#1",
        routers=(),
        energy_agent=address,
        energy_agent_port=port,
        meter=meter,
    )


RANKS = (
    RankProcess(rank=0, pid=os.getpid(), device="cpu"),
    RankProcess(rank=1, pid=os.getppid(), device="cpu", node="another", address="127.0.0.1"),
)


async def test_a_group_over_two_hosts_is_metered_by_the_agents_of_both(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'energy.sock'}"
    near, far, port = await start_agents(address)
    feed = make_feed(config_of(address, port), group="m", ranks=RANKS)
    assert feed is not None
    readings = []
    try:
        async with asyncio.timeout(WAIT_S), aclosing(feed.readings()) as stream:
            async for reading in stream:
                assert reading.t_ns <= time.monotonic_ns()
                readings.append(reading)
                if len(readings) == 6:
                    break
                feed.want_edge()
    finally:
        await near.stop()
        await far.stop()
    for earlier, later in pairwise(readings):
        assert later.t_ns > earlier.t_ns
        assert not later.gap
        assert later.static_mj == later.energy_mj
    seconds = (readings[-1].t_ns - readings[0].t_ns) / 1e9
    drawn_mj = readings[-1].energy_mj - readings[0].energy_mj
    # Two counters of whole millijoules. The clock of the far one is known to half a round trip.
    assert drawn_mj == pytest.approx(2 * STATIC_W * 1e3 * seconds, abs=4 + 0.02 * drawn_mj)
    assert len(feed.metrics_addresses) == 2


async def test_a_host_that_is_refused_ends_the_feed_of_all(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'energy.sock'}"
    near, far, port = await start_agents(address)
    feed = make_feed(config_of(address, port, meter="abacus"), group="m", ranks=RANKS)
    assert feed is not None
    try:
        async with asyncio.timeout(WAIT_S), aclosing(feed.readings()) as stream:
            with pytest.raises(MeterUnavailable, match="abacus"):
                await anext(stream)
    finally:
        await near.stop()
        await far.stop()
