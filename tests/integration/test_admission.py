"""Who comes in, who waits and who is told to go, through a real router with tenants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import grpc

from cluster.request.failover import FailoverBudget
from cluster.router import service
from cluster.router.caller import Caller
from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_inference_pb2 as pb
from tests.fake_replica import EOS
from tests.router_fixture import (
    TestRouter,
    collect,
    error_details,
    fail,
    make_config,
    make_request,
    run_test_router,
)


@asynccontextmanager
async def router_of(
    *, tenants: list[dict[str, Any]] | None = None, **model: Any
) -> AsyncIterator[TestRouter]:
    config = make_config(model=model, tenants=tenants or [{"name": "default"}], ledger={"enabled": False})
    async with run_test_router(config) as router:
        yield router


async def hold_line(router: TestRouter, replica: Any, count: int) -> list[Any]:
    """Requests that fill the replica, which makes no step."""
    replica.running.clear()
    calls = [router.inference.Generate(make_request()) for _ in range(count)]
    await replica.wait_command("submit", count=count)
    return calls


def admissions(router: TestRouter) -> dict[tuple[str, str, str], float]:
    """How many arrived, by model, tenant and outcome."""
    return {
        (sample.labels["model"], sample.labels["tenant"], sample.labels["outcome"]): sample.value
        for family in router.router._metrics.registry.collect()
        for sample in family.samples
        if sample.name == "wattline_admissions_total"
    }


async def test_a_limit_of_the_tenant_is_named_with_the_time_to_come_back() -> None:
    tenants = [{"name": "default", "concurrent": 1}]
    async with router_of(tenants=tenants) as router, router.replica() as replica:
        (call,) = await hold_line(router, replica, 1)
        error = await fail(router.inference.Generate(make_request()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the tenant's limit concurrent=1 is reached" in str(error.details())
        details = error_details(error)
        assert details["QuotaFailure"].violations[0].subject == "tenant:default"
        retry_ms = details["RetryInfo"].retry_delay.ToMilliseconds()
        assert 250 <= retry_ms <= 375
        assert dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"] == str(retry_ms)
        replica.running.set()
        await collect(call)
        await collect(router.inference.Generate(make_request()))


async def test_tokens_are_charged_and_what_was_not_used_is_given_back() -> None:
    # A burst of 100 tokens: each of the first is charged 5 + 90, and gives nearly all of it back.
    tenants = [{"name": "default", "tokens_per_s": 20.0}]
    async with router_of(tenants=tenants) as router, router.replica(tokens_per_step=64) as replica:
        replica.tokens = lambda _, pos: EOS
        for _ in range(4):
            await collect(router.inference.Generate(make_request(max_tokens=90)))
        replica.tokens = None
        await collect(router.inference.Generate(make_request(max_tokens=200)))
        error = await fail(router.inference.Generate(make_request(max_tokens=200)))
        assert "tokens_per_s=20" in str(error.details())


async def test_joules_of_a_day_run_out() -> None:
    # Ten joules: an answer of eight tokens costs three, as the replica bills it.
    tenants = [{"name": "default", "joules_per_day": 10.0}]
    async with router_of(tenants=tenants) as router, router.replica():
        answers = 0
        while answers < 20:
            call = router.inference.Generate(make_request(energy_wait_ms=1000))
            try:
                await collect(call)
            except grpc.aio.AioRpcError as error:
                assert "joules_per_day=10" in str(error.details())
                break
            answers += 1
        assert 3 <= answers <= 5


async def test_the_queue_is_left_by_whoever_goes_and_served_in_order() -> None:
    async with router_of() as router, router.replica(max_sequences=1) as replica:
        await hold_line(router, replica, 2)
        waiting = [router.inference.Generate(make_request()) for _ in range(3)]
        gate = router.router._streams._gates["tiny"]
        while len(gate) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        waiting[1].cancel()
        while len(gate) > 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        replica.running.set()
        for call in (waiting[0], waiting[2]):
            answer = await collect(call)
            assert answer.final.timing.queue_ms > 0.0
        assert len(gate) == 0
        assert len(replica.received("submit")) == 4


async def test_who_waits_is_told_when_the_replicas_are_gone() -> None:
    async with router_of() as router:
        replica = router.replica(max_sequences=1)
        await replica.attach()
        await hold_line(router, replica, 2)
        waiting = asyncio.ensure_future(fail(router.inference.Generate(make_request())))
        while not len(router.router._streams._gates["tiny"]):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        await replica.leave()
        assert (await waiting).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once() -> None:
    async with router_of() as router, router.replica(max_sequences=1, step_s=10.0) as replica:
        await hold_line(router, replica, 2)
        # One row, steps of ten seconds: the queue is minutes long.
        error = await fail(router.inference.Generate(make_request(), timeout=30.0))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the deadline is in" in str(error.details())


async def test_tenants_share_by_weight_and_are_counted(monkeypatch: Any) -> None:
    """A flood of one tenant, then a few of another: they take turns."""
    names = iter(["flood"] * 10 + ["small"] * 3)
    made: list[str] = []

    def make_caller(**fields: Any) -> Caller:
        made.append(next(names))
        return Caller(**{**fields, "tenant": made[-1]})

    monkeypatch.setattr(service, "Caller", make_caller)
    tenants = [{"name": "flood"}, {"name": "small"}]
    async with router_of(tenants=tenants) as router, router.replica(max_sequences=1) as replica:
        await hold_line(router, replica, 2)
        gate = router.router._streams._gates["tiny"]
        calls = []
        for count in range(1, 12):
            calls.append(router.inference.Generate(make_request(f"request {count}")))
            while len(gate) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        ended: list[int] = []

        async def finish(index: int) -> None:
            await collect(calls[index])
            ended.append(index)

        replica.running.set()
        await asyncio.gather(*(finish(index) for index in range(11)))
        # The three of the small tenant came last, and are served among the first seven.
        assert set(ended[:7]) >= {8, 9, 10}
        counts = {("tiny", "flood", "admitted"): 10.0, ("tiny", "small", "admitted"): 3.0}
        assert admissions(router) == counts
        status = await router.cluster.Status(cluster_pb.StatusRequest())
        assert status.models[0].active_requests == 0


async def test_every_arrival_is_counted_once_whatever_becomes_of_it(monkeypatch: Any) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(service, "Caller", lambda **fields: Caller(**{**fields, **given}))
    tenants, poison = [{"name": "default", "concurrent": 3}], tuple(range(9))
    async with router_of(tenants=tenants) as router:
        ends = [await fail(router.inference.Generate(make_request(model="absent")))]
        async with router.replica(max_sequences=1, context_tokens=64) as replica:
            router.router._streams._resumption._quarantine.add("tiny", poison, now_s=monotonic())
            for ids in (poison, [1] * 64):
                request = make_request()
                request.tokens.CopyFrom(pb.TokenIds(ids=ids))
                ends.append(await fail(router.inference.Generate(request)))
            given["time_remaining_s"] = lambda: 0.0
            ends.append(await fail(router.inference.Generate(make_request())))
            given.clear()
            held = await hold_line(router, replica, 2)
            gone = router.inference.Generate(make_request())
            while not router.num_queued:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            ends.append(await fail(router.inference.Generate(make_request())))
            gone.cancel()
            while router.num_queued:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            replica.running.set()
            for call in held:
                await collect(call)

        assert [end.code().name for end in ends] == [
            "UNAVAILABLE",
            "ABORTED",
            "INVALID_ARGUMENT",
            "DEADLINE_EXCEEDED",
            "RESOURCE_EXHAUSTED",
        ]
        assert admissions(router) == {
            ("absent", "default", "no_replica"): 1.0,
            ("tiny", "default", "quarantined"): 1.0,
            ("tiny", "default", "invalid"): 1.0,
            ("tiny", "default", "deadline"): 1.0,
            ("tiny", "default", "tenant_limit"): 1.0,
            ("tiny", "default", "cancelled"): 1.0,
            ("tiny", "default", "admitted"): 2.0,
        }
        assert router.router._models["tiny"].refused_total == 4


async def test_only_who_is_admitted_earns_a_resumption(monkeypatch: Any) -> None:
    earned: list[None] = []
    monkeypatch.setattr(FailoverBudget, "earn", lambda _: earned.append(None))
    async with router_of(limits={"max_queued": 1}) as router, router.replica(max_sequences=1) as replica:
        held = await hold_line(router, replica, 2)
        held.append(router.inference.Generate(make_request()))
        while not router.num_queued:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        error = await fail(router.inference.Generate(make_request()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(earned) == 2
        replica.running.set()
        for call in held:
            await collect(call)
        assert len(earned) == 3
