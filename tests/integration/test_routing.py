"""Where requests go through a real router: to the cache that knows them, to their session, packed."""

from __future__ import annotations

import asyncio

from protos import wattline_inference_pb2 as pb
from protos import wattline_link_pb2 as link
from replicas.engine.prefix_hash import extend_hashes
from tests.fake_replica import FakeReplica
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

PROMPT = list(range(3, 99))


def make_prompt(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=MODEL,
        tokens=pb.TokenIds(ids=PROMPT),
        limits=pb.Limits(max_tokens=4),
        **fields,  # type: ignore[arg-type]
    )


async def say_cached(router: TestRouter, replica: FakeReplica, *, is_snapshot: bool, is_filed: bool) -> None:
    """The replica says that it holds the prompt's blocks, or no more; returns when the router has read it."""
    submit = (await replica.wait_command("submit")).submit
    hashes: list[bytes] = []
    extend_hashes(hashes, PROMPT, block_tokens=16, salt=submit.cache_salt)
    joined = b"".join(hashes)
    added, removed = (joined, b"") if is_filed else (b"", joined)
    change = link.CacheChange(is_snapshot=is_snapshot, added=added, removed=removed)
    prefixes = router.router._pool.prefixes
    await replica.send(link.FromReplica(heartbeat=link.Heartbeat(load=replica.load()), cache=[change]))
    while bool(len(prefixes)) is not is_filed:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_a_prompt_goes_where_it_is_cached_until_it_is_not() -> None:
    config = make_config(model={"balancing": "prefix"})
    async with (
        run_test_router(config) as router,
        router.replica(replica_id="a") as a,
        router.replica(replica_id="b") as b,
    ):
        while not (a.received("submit") and b.received("submit")):
            await collect(router.inference.Generate(make_prompt()))
        await say_cached(router, b, is_snapshot=True, is_filed=True)
        before = len(a.received("submit"))
        for _ in range(8):
            await collect(router.inference.Generate(make_prompt()))
        assert len(a.received("submit")) == before
        await say_cached(router, b, is_snapshot=False, is_filed=False)
        while len(a.received("submit")) == before:
            await collect(router.inference.Generate(make_prompt()))


async def test_what_a_replica_held_is_forgotten_when_it_leaves() -> None:
    async with run_test_router() as router, router.replica(replica_id="a") as a:
        await collect(router.inference.Generate(make_prompt()))
        await say_cached(router, a, is_snapshot=True, is_filed=True)
        await a.leave()
        while len(router.router._pool.prefixes):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_session_stays_with_its_replica() -> None:
    config = make_config(model={"balancing": "prefix"})
    async with (
        run_test_router(config) as router,
        router.replica(replica_id="a") as a,
        router.replica(replica_id="b") as b,
    ):
        for session in ("x", "y", "z", "w"):
            counts = len(a.received("submit")), len(b.received("submit"))
            for _ in range(4):
                await collect(router.inference.Generate(make_prompt(session_id=session)))
            news = len(a.received("submit")) - counts[0], len(b.received("submit")) - counts[1]
            assert sorted(news) == [0, 4]


async def test_energy_keeps_to_the_replica_that_works_already() -> None:
    config = make_config(model={"balancing": "energy"})
    async with (
        run_test_router(config) as router,
        router.replica(replica_id="a", step_s=0.002) as a,
        router.replica(replica_id="b", step_s=0.002) as b,
    ):
        long_one = asyncio.ensure_future(
            collect(router.inference.Generate(make_request(max_tokens=2000, ignore_eos=True)))
        )
        while not (a.received("submit") or b.received("submit")):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        for _ in range(6):
            await collect(router.inference.Generate(make_prompt()))
        assert sorted([len(a.received("submit")), len(b.received("submit"))]) == [0, 7]
        long_one.cancel()


async def test_a_long_session_id_is_refused() -> None:
    async with run_test_router() as router:
        error = await fail(router.inference.Generate(make_prompt(session_id="s" * 129)))
        assert "session_id" in str(error_details(error)["BadRequest"])
