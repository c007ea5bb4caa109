"""Replicas that attach, drain, vanish, stall and come back, as a router and its callers see them."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.addresses import PortInUse, read_addresses
from cluster.edge.process import Router
from cluster.link.replica_connection import STALL_S
from cluster.text.null_tokenizer import NullTokenizer
from protos import wattline_cluster_pb2 as pb
from protos import wattline_link_pb2 as link
from tests.router_fixture import (
    MODEL,
    TestRouter,
    collect,
    error_details,
    fail,
    make_config,
    make_request,
    run_test_router,
)

WAIT_S = 150.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    async with run_test_router() as running:
        yield running


async def wait_health(router: TestRouter, service: str, status: int) -> None:
    """Watch until a service has a status."""
    call = health_pb2_grpc.HealthStub(router.channel).Watch(health_pb2.HealthCheckRequest(service=service))
    async with asyncio.timeout(WAIT_S):
        async for update in call:
            if update.status == status:
                break
    call.cancel()


async def replicas(router: TestRouter) -> dict[str, pb.ReplicaStatus]:
    """Attached replicas of the first model, as Status shows them."""
    status = await router.cluster.Status(pb.StatusRequest())
    return {replica.replica_id: replica for replica in status.models[0].replicas}


async def test_health_follows_the_replicas(router: TestRouter) -> None:
    await wait_health(router, "", NOT_SERVING)
    await wait_health(router, MODEL, NOT_SERVING)
    async with router.replica() as replica:
        await wait_health(router, MODEL, SERVING)
        await wait_health(router, "", SERVING)
        await wait_health(router, "absent", NOT_SERVING)
        await replica.say_draining()
        await wait_health(router, MODEL, NOT_SERVING)


async def test_a_killed_replica_fails_its_streams_as_unavailable(router: TestRouter) -> None:
    replica = router.replica(step_s=0.001)
    await replica.attach()
    messages = aiter(router.inference.Generate(make_request(max_tokens=4000)))
    await anext(messages)
    await replica.leave(says_goodbye=False)
    error = await fail(messages)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "the replica serving this request stopped; retry"
    assert "RetryInfo" in error_details(error)
    await wait_health(router, MODEL, NOT_SERVING)


async def test_a_replica_that_says_goodbye_is_gone_at_once(router: TestRouter) -> None:
    async with router.replica() as replica:
        replica.running.clear()
        call = router.inference.Generate(make_request())
        await replica.wait_command("submit")
    assert (await fail(call)).code() is grpc.StatusCode.UNAVAILABLE
    assert await replicas(router) == {}


async def test_a_draining_replica_finishes_but_gets_nothing_new(router: TestRouter) -> None:
    async with router.replica(replica_id="old") as old, router.replica(replica_id="new") as new:
        old.running.clear()
        new.running.clear()
        calls = [router.inference.Generate(make_request()) for _ in range(2)]
        await asyncio.gather(old.wait_command("submit"), new.wait_command("submit"))
        await router.cluster.DrainReplica(pb.DrainReplicaRequest(replica_id="old"))
        await old.wait_command("drain")
        old.running.set()
        new.running.set()
        for call in [*calls, *(router.inference.Generate(make_request()) for _ in range(5))]:
            assert len((await collect(call)).token_ids) == 8
        assert (len(old.received("submit")), len(new.received("submit"))) == (1, 6)
        assert (await replicas(router))["old"].state == pb.REPLICA_STATE_DRAINING


async def test_draining_an_unknown_replica_is_not_found(router: TestRouter) -> None:
    error = await fail(router.cluster.DrainReplica(pb.DrainReplicaRequest(replica_id="nope")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_newer_life_takes_the_place_of_the_older(router: TestRouter) -> None:
    async with router.replica(epoch=3) as old:
        old.running.clear()
        call = router.inference.Generate(make_request())
        await old.wait_command("submit")
        async with router.replica(epoch=4):
            assert list((await collect(call)).final.resumed_at) == [0]
            assert (await replicas(router))["replica-0"].epoch == 4
            assert len((await collect(router.inference.Generate(make_request()))).token_ids) == 8
            with pytest.raises(grpc.aio.AioRpcError, match="attached by another stream"):
                await router.replica(epoch=4).attach()
            with pytest.raises(grpc.aio.AioRpcError, match="epoch 2 of this replica is over"):
                await router.replica(epoch=2).attach()


async def test_a_message_of_another_epoch_is_dropped(router: TestRouter) -> None:
    async with router.replica(epoch=3) as replica:
        await replica.send(link.FromReplica(epoch=2, draining=link.Draining(reason="a ghost")))
        await collect(router.inference.Generate(make_request()))
        assert (await replicas(router))["replica-0"].state == pb.REPLICA_STATE_READY


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model": "gpt-9"}, "is not configured"),
        ({"context_tokens": 0}, "must be at least 1"),
        ({"replica_id": ""}, "Hello"),
    ],
    ids=["model", "shape", "name"],
)
async def test_a_replica_that_does_not_fit_is_refused(fields: dict[str, object], problem: str) -> None:
    async with run_test_router() as router:
        with pytest.raises(grpc.aio.AioRpcError, match=problem):
            await router.replica(**fields).attach()


async def test_a_silent_replica_is_stalled_and_recovers(
    router: TestRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.link.replica_connection.STALL_S", 0.1)
    monkeypatch.setattr("tests.fake_replica.HEARTBEAT_S", 3600.0)
    async with router.replica() as replica:
        await wait_health(router, MODEL, NOT_SERVING)
        assert (await replicas(router))["replica-0"].state == pb.REPLICA_STATE_STALLED
        assert (await fail(router.inference.Generate(make_request()))).code() is grpc.StatusCode.UNAVAILABLE
        monkeypatch.setattr("cluster.link.replica_connection.STALL_S", STALL_S)
        await replica.send(link.FromReplica(heartbeat=link.Heartbeat(load=replica.load())))
        await wait_health(router, MODEL, SERVING)


async def test_requests_spread_over_replicas_that_have_room(
    router: TestRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without heartbeats: of two, one would have told of requests that are still counted as on their way."""
    monkeypatch.setattr("cluster.link.replica_connection.STALL_S", 3600.0)
    monkeypatch.setattr("tests.fake_replica.HEARTBEAT_S", 3600.0)
    async with router.replica(replica_id="a") as a, router.replica(replica_id="b") as b:
        for replica in (a, b):
            replica.running.clear()
        calls = [router.inference.Generate(make_request()) for _ in range(8)]
        await asyncio.gather(a.wait_command("submit", count=4), b.wait_command("submit", count=4))
        for replica in (a, b):
            replica.running.set()
        for call in calls:
            await collect(call)


async def test_status_shows_what_was_done(router: TestRouter) -> None:
    async with router.replica():
        await collect(router.inference.Generate(make_request(energy_wait_ms=1000)))
        status = await router.cluster.Status(pb.StatusRequest())
        signals = await anext(aiter(router.cluster.WatchSignals(pb.WatchSignalsRequest())))
    model = status.models[0]
    assert (model.name, model.active_requests, model.energy_source) == (MODEL, 0, "fake")
    assert model.output_tokens_per_s > 0.0
    assert model.joules_per_output_token == 3.0 / 8
    assert model.replicas[0].hello.architecture == "NullForCausalLM"
    demand = signals.models[0]
    assert (demand.requests_total, demand.output_tokens_total, demand.energy_mj_total) == (1, 8, 3000)


async def test_what_waits_in_the_router_is_shown_as_waiting(router: TestRouter) -> None:
    async with router.replica(max_sequences=1) as replica:
        replica.running.clear()
        calls = [router.inference.Generate(make_request()) for _ in range(6)]
        while router.num_queued < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        status = await router.cluster.Status(pb.StatusRequest())
        signals = await anext(aiter(router.cluster.WatchSignals(pb.WatchSignalsRequest())))
        shown = router.router._snapshot()["models"][0]
        for call in calls:
            call.cancel()
    assert status.models[0].waiting_requests == signals.models[0].requests_waiting == shown["waiting"] == 4


async def test_a_stop_lets_streams_end_and_refuses_new_ones() -> None:
    async with run_test_router() as running, running.replica() as replica:
        replica.running.clear()
        call = running.inference.Generate(make_request())
        await replica.wait_command("submit")
        stopping = asyncio.create_task(running.router.stop(drain_s=WAIT_S))
        await wait_health(running, "", NOT_SERVING)
        refused = await fail(running.inference.Generate(make_request()))
        replica.running.set()
        answer = await collect(call)
        await stopping
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    assert len(answer.token_ids) == 8


@pytest.mark.parametrize("key", ["grpc_port", "link_port", "http_port"])
async def test_a_port_in_use_is_a_sentence_that_names_its_key(router: TestRouter, key: str) -> None:
    taken = {
        "grpc_port": router.addresses.grpc,
        "link_port": router.addresses.link,
        "http_port": router.addresses.http,
    }[key]
    config = make_config(router={key: int(taken.rpartition(":")[2])})
    second = Router(config, tokenizers={model.name: NullTokenizer(1000) for model in config.models})
    with pytest.raises(PortInUse, match=rf"^router\.{key}: {taken} cannot be bound"):
        await second.start()
    await second.stop(drain_s=0.0)


@pytest.mark.processes
async def test_the_process_writes_its_addresses_and_ends_on_sigterm(tmp_path: Path) -> None:
    config_path, addresses_path = tmp_path / "wattline.yaml", tmp_path / "run" / "router.json"
    config_path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cluster.edge",
        "--config",
        str(config_path),
        "--addresses",
        str(addresses_path),
    )
    try:
        async with asyncio.timeout(WAIT_S):
            while not addresses_path.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            addresses = read_addresses(addresses_path)
            async with grpc.aio.insecure_channel(addresses.grpc) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert addresses.pid == process.pid
    assert not addresses_path.exists()
