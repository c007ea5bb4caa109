"""Wires between replicas and router that go silent, slow or away. Cases 11 and 12 of the fault matrix."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from protos import wattline_cluster_pb2 as cluster_pb
from replicas.supervisor.supervisor import Supervisor
from tests.chaos.faulty_wire import FaultyWire
from tests.chaos.test_lost_ranks import assert_exact, make_asks
from tests.integration.test_failover_processes import disturbed, running, until
from tests.router_fixture import TestRouter, collect, make_config, run_test_router

pytestmark = [pytest.mark.processes, pytest.mark.chaos]

WAIT_S = 150.0
LOSSY_S = (0.0,) * 15 + (0.005, 0.02, 0.05, 0.05, 0.2)
"""Jitter up to 50 ms, and one chunk in twenty that TCP sends again after 200 ms."""


@asynccontextmanager
async def wired(
    *, freeze_s: float, delays_s: tuple[float, ...] = ()
) -> AsyncIterator[tuple[TestRouter, dict[str, Supervisor], dict[str, FaultyWire]]]:
    """Two replicas, each behind a wire of its own."""
    config = make_config(router={"failover": {"freeze_s": freeze_s}})
    with TemporaryDirectory(prefix="wl-") as name:
        async with run_test_router(config) as router, AsyncExitStack() as stack, asyncio.timeout(WAIT_S):
            wires, replicas = {}, {}
            for seed, replica_id in enumerate(("one", "two")):
                wire = FaultyWire(router.addresses.link, delays_s=delays_s, seed=seed)
                wires[replica_id] = await stack.enter_async_context(wire)
                replicas[replica_id] = await stack.enter_async_context(
                    running(Path(name), router, replica_id, routers=(wire.address,))
                )
            yield router, replicas, wires


def all_ready(replicas: list[cluster_pb.ReplicaStatus]) -> bool:
    return [one.state for one in replicas] == [cluster_pb.REPLICA_STATE_READY] * 2


@pytest.mark.parametrize("fault", ["blackhole", pytest.param("cut", marks=pytest.mark.slow)])
async def test_streams_leave_a_broken_wire_and_a_healed_one_doubles_nothing(fault: str) -> None:
    """Case 11. Promise: streams go on at the other replica, what the old one sent late is dropped."""
    requests = make_asks()
    async with wired(freeze_s=2.0) as (router, replicas, wires):

        def breaks(victim: Supervisor) -> None:
            wire = next(wires[name] for name, one in replicas.items() if one is victim)
            getattr(wire, fault)()

        answers = await disturbed(router, replicas, requests, breaks)
        for wire in wires.values():
            wire.heal()
        await until(router, all_ready)
        await until(router, lambda found: not any(sum(one.load.running) for one in found))
        again = list(await asyncio.gather(*(collect(router.inference.Generate(one)) for one in requests)))
    assert_exact(requests, answers)
    assert_exact(requests, again)
    assert any(answer.final.attempts == 2 for answer in answers)


@pytest.mark.slow
async def test_a_bad_wire_is_no_reason_to_leave_it() -> None:
    """Case 12. Promise: jitter and loss slow streams down; no replica is given up, no stream is moved."""
    requests = make_asks()
    async with wired(freeze_s=30.0, delays_s=LOSSY_S) as (router, replicas, _):
        await until(router, all_ready)
        epochs = [replica.epoch for replica in await found(router)]
        answers = await disturbed(router, replicas, requests, lambda _: None)
        assert [replica.epoch for replica in await found(router)] == epochs
    assert_exact(requests, answers)
    assert [answer.final.attempts for answer in answers] == [1] * len(requests)


async def found(router: TestRouter) -> list[cluster_pb.ReplicaStatus]:
    return list((await router.cluster.Status(cluster_pb.StatusRequest())).models[0].replicas)
