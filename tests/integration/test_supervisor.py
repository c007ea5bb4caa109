"""One replica as it is: a supervisor, two processes of the null engine, and real links to small routers.

Every test ends with the group gone: no process, no socket, nothing on the shared-memory file system.
"""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from protos import wattline_link_pb2 as link_pb2
from replicas.config import EngineLimits, NullEngineConfig, ParallelConfig, ReplicaConfig
from replicas.errors import RankLost
from replicas.link.protocol import PROTOCOL_VERSION
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor
from tests.small_router import WAIT_S, AttachedReplica, SmallRouter

pytestmark = pytest.mark.processes

NULL = NullEngineConfig(step_ms=2.0, context_tokens=100_000)
LIMITS = EngineLimits(max_sequences=8, max_waiting=8, num_blocks=8192)
LONG = 60_000
"""Tokens of an answer that is under way for two minutes, unless it is ended."""


@dataclass
class Replica:
    """A running supervisor and what it told its owner."""

    supervisor: Supervisor
    config: ReplicaConfig
    fatal_reasons: list[str] = field(default_factory=list)
    fatal: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.supervisor.processes]

    def on_fatal(self, reason: str) -> None:
        self.fatal_reasons.append(reason)
        self.fatal.set()

    async def lost(self) -> str:
        async with asyncio.timeout(WAIT_S):
            await self.fatal.wait()
        (reason,) = self.fatal_reasons
        return reason


def make_config(folder: Path, *routers: SmallRouter) -> ReplicaConfig:
    shared_dir = folder / "shm"
    shared_dir.mkdir()
    return ReplicaConfig(
        model="null",
        source="null",
        replica_id="replica/1",
        routers=tuple(router.address for router in routers),
        parallel=ParallelConfig(tensor=2),
        limits=LIMITS,
        null=NULL,
        runtime_dir=str(folder / "run"),
        shared_dir=str(shared_dir),
        drain_s=25.0,
        ready_timeout_s=WAIT_S,
        stall_floor_s=WAIT_S,
    )


@asynccontextmanager
async def running(config: ReplicaConfig) -> AsyncIterator[Replica]:
    holder: list[Replica] = []
    supervisor = Supervisor(
        config,
        SubprocessRankGroup(runtime_dir=Path(config.runtime_dir)),
        lambda reason: holder[0].on_fatal(reason),
        epoch=7,
        first_link_timeout_s=WAIT_S,
    )
    replica = Replica(supervisor=supervisor, config=config)
    holder.append(replica)
    try:
        await supervisor.start()
        yield replica
    finally:
        await supervisor.stop()
    assert_nothing_left(replica)


def assert_nothing_left(replica: Replica) -> None:
    assert [pid for pid in replica.pids if psutil.pid_exists(pid)] == []
    assert list(Path(replica.config.shared_dir).iterdir()) == []
    assert list(Path(replica.config.runtime_dir).glob("*.sock")) == []


async def until(predicate: Callable[[], bool], what: str) -> None:
    """Poll something outside the link; bounded."""
    for _ in range(round(WAIT_S / 0.02)):
        if predicate():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"waited {WAIT_S:g} s in vain: {what}")


async def stream_under_way(link: AttachedReplica, request_id: int) -> None:
    link.submit(request_id, max_tokens=LONG)
    await link.wait(lambda: len(link.token_ids(request_id)) >= 3, f"the first tokens of request {request_id}")


async def scrape(address: str) -> dict[str, float]:
    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as answer:
            return str(answer.read(), "utf-8")

    text = await asyncio.to_thread(read)
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def test_an_answer_streams_in_order_and_is_billed(tmp_path: Path) -> None:
    async with SmallRouter() as router, running(make_config(tmp_path, router)) as replica:
        link = await router.attached()
        assert (link.hello.protocol, link.hello.model, link.hello.replica_id) == (
            PROTOCOL_VERSION,
            "null",
            "replica/1",
        )
        assert (link.epoch, link.hello.energy_source, link.hello.tensor_parallel) == (7, "fake", 2)
        assert [rank.pid for rank in link.hello.ranks] == replica.pids
        assert link.hello.supervisor_pid == os.getpid()
        link.submit(1, max_tokens=20)
        last = await link.finished(1)
        offset = 0
        for delta in link.deltas[1]:
            assert (delta.first_offset, delta.attempt) == (offset, 1)
            offset += len(delta.token_ids)
        assert (offset, last.finish) == (20, link_pb2.ENGINE_FINISH_LENGTH)
        assert last.timing.decode_us > 0
        bill = await link.billed(1)
        assert (bill.source, bill.confidence_factor, bill.attempt) == ("fake", 1.0, 1)
        assert bill.prefill_mj + bill.decode_mj > 0
        assert link.epochs == {7}
        replica.supervisor.check_health()


async def test_the_ledger_divides_the_meter_exactly(tmp_path: Path) -> None:
    async with SmallRouter() as router, running(make_config(tmp_path, router)):
        link = await router.attached()
        for request_id in range(1, 7):
            link.submit(request_id, prompt_ids=range(3, 3 + 5 * request_id), max_tokens=10 * request_id)
        bills = [await link.billed(request_id) for request_id in range(1, 7)]
        billed_mj = sum(bill.prefill_mj + bill.decode_mj for bill in bills)
        names = [
            f'wattline_ledger_millijoules{{ledger="{name}"}}' for name in ("request", "idle", "unattributed")
        ]
        for _ in range(3):
            values = await scrape(link.hello.metrics_address)
            request_mj, idle_mj, unattributed_mj = (int(values[name]) for name in names)
            assert (
                request_mj + idle_mj + unattributed_mj
                == values['wattline_ledger_millijoules{ledger="meter"}']
            )
            assert billed_mj <= request_mj
        warm_up_tokens = link.hello.load.generated_tokens_total
        generated_tokens = values['wattline_engine_tokens_total{kind="generated"}'] - warm_up_tokens
        assert generated_tokens == sum(10 * n for n in range(1, 7))
        assert values["wattline_engine_kv_blocks_free"] == values["wattline_engine_kv_blocks"] > 0


async def test_same_prompt_same_tokens_whatever_the_router(tmp_path: Path) -> None:
    first, second = SmallRouter("a"), SmallRouter("b")
    async with first, second, running(make_config(tmp_path, first, second)):
        links = [await first.attached(), await second.attached()]
        for link in links:
            link.submit(1, prompt_ids=(9, 8, 7), max_tokens=16)
        for link in links:
            await link.finished(1)
        assert links[0].token_ids(1) == links[1].token_ids(1)


async def test_cancel_frees_the_request_and_answers_nothing_but_the_energy(tmp_path: Path) -> None:
    async with SmallRouter() as router, running(make_config(tmp_path, router)) as replica:
        link = await router.attached()
        await stream_under_way(link, 1)
        link.cancel(1)
        await link.billed(1)
        assert link.last_delta(1) is None
        assert replica.supervisor.num_in_flight == 0


async def test_stop_finishes_the_answer(tmp_path: Path) -> None:
    async with SmallRouter() as router, running(make_config(tmp_path, router)):
        link = await router.attached()
        await stream_under_way(link, 1)
        link.stop(1)
        link.stop(1)
        assert (await link.finished(1)).finish == link_pb2.ENGINE_FINISH_STOP
        assert len(link.token_ids(1)) < LONG


async def test_a_deadline_ends_the_answer(tmp_path: Path) -> None:
    async with SmallRouter() as router, running(make_config(tmp_path, router)):
        link = await router.attached()
        link.submit(1, max_tokens=LONG, deadline_ms=50)
        assert (await link.finished(1)).finish == link_pb2.ENGINE_FINISH_DEADLINE


async def test_a_prompt_that_does_not_fit_fails_alone_and_its_trace_is_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with SmallRouter() as router:
        config = replace(make_config(tmp_path, router), null=replace(NULL, context_tokens=512))
        async with running(config):
            link = await router.attached()
            link.submit(1, max_tokens=30)
            link.submit(2, prompt_ids=range(3, 3 + 600))
            link.submit(3, prompt_ids=(NULL.vocab_size,))
            for request_id in (2, 3):
                last = await link.finished(request_id)
                assert (last.finish, last.error.code) == (link_pb2.ENGINE_FINISH_ERROR, "INVALID_ARGUMENT")
                assert "prompt_ids" in last.error.message
            assert (await link.finished(1)).finish == link_pb2.ENGINE_FINISH_LENGTH
    told = next(text for text in caplog.messages if text.startswith("sequence_failed"))
    assert "code=INVALID_ARGUMENT" in told and told.endswith(f" trace={2:032x}")


async def test_more_than_the_queue_holds_is_refused(tmp_path: Path) -> None:
    async with SmallRouter() as router, running(make_config(tmp_path, router)):
        link = await router.attached()
        capacity = LIMITS.max_sequences + LIMITS.max_waiting
        running_ids, held_ids = range(1, LIMITS.max_sequences + 1), range(1, capacity + 1)
        for request_id in running_ids:
            await stream_under_way(link, request_id)
        refused_ids = range(capacity + 1, capacity + 11)
        for request_id in (*held_ids[len(running_ids) :], *refused_ids):
            link.submit(request_id, max_tokens=LONG)
        codes = [(await link.finished(request_id)).error.code for request_id in refused_ids]
        assert codes == ["RESOURCE_EXHAUSTED"] * len(refused_ids)
        for request_id in held_ids:
            link.stop(request_id)
        ends = [(await link.finished(request_id)).finish for request_id in held_ids]
        assert ends == [link_pb2.ENGINE_FINISH_STOP] * capacity


async def test_a_lost_router_is_dialled_again_and_its_requests_are_cancelled(tmp_path: Path) -> None:
    async with SmallRouter() as router, running(make_config(tmp_path, router)) as replica:
        link = await router.attached()
        await stream_under_way(link, 1)
        link.hang_up()
        again = await router.attached()
        await until(lambda: replica.supervisor.num_in_flight == 0, "the orphan's end")
        assert [rank.pid for rank in again.hello.ranks] == replica.pids
        again.submit(1, max_tokens=5)
        await again.finished(1)
        assert len(again.token_ids(1)) == 5
        replica.supervisor.check_health()
        assert replica.fatal_reasons == []


async def test_a_restarted_router_is_found_again(tmp_path: Path) -> None:
    async with SmallRouter() as router:
        config = make_config(tmp_path, router)
        async with running(config) as replica:
            first = await router.attached()
            await router.__aexit__(None, None, None)
            await first.ended()
            async with SmallRouter(port=router.port) as restarted:
                link = await restarted.attached()
                assert [rank.pid for rank in link.hello.ranks] == replica.pids
                link.submit(1, max_tokens=3)
                await link.finished(1)


@pytest.mark.parametrize(("rank", "is_draining"), [(0, False), (1, False), (1, True)])
async def test_a_killed_rank_takes_the_group_with_it(
    tmp_path: Path, rank: int, is_draining: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with SmallRouter() as router, running(make_config(tmp_path, router)) as replica:
        link = await router.attached()
        await stream_under_way(link, 1)
        drain = asyncio.create_task(replica.supervisor.drain()) if is_draining else None
        if drain is not None:
            await link.wait(lambda: link.draining, "Draining")
        os.kill(replica.pids[rank], signal.SIGKILL)
        reason = await replica.lost()
        await link.ended()
        assert link.goodbye and (link.goodbye.reason, link.goodbye.is_lost) == (reason, True)
        if drain is not None:
            await drain
        assert f"in_flight=1 traces={1:032x}" in caplog.text
        assert link.last_delta(1) is None
        assert_nothing_left(replica)
        with pytest.raises(RankLost):
            replica.supervisor.check_health()


async def test_a_frozen_rank_is_a_stall(tmp_path: Path) -> None:
    async with SmallRouter() as router:
        config = replace(make_config(tmp_path, router), stall_floor_s=1.0)
        async with running(config) as replica:
            link = await router.attached()
            os.kill(replica.pids[1], signal.SIGSTOP)
            link.submit(1)
            reason = await replica.lost()
            assert reason.startswith("no step for ")
            await link.ended()
            assert link.goodbye and (link.goodbye.reason, link.goodbye.is_lost) == (reason, True)
            assert_nothing_left(replica)


async def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    async with SmallRouter() as router:
        config = replace(make_config(tmp_path, router), null=replace(NULL, fail_at_step=30))
        async with running(config) as replica:
            link = await router.attached()
            link.submit(1, max_tokens=LONG)
            assert "30" in await replica.lost()


async def test_drain_lets_live_answers_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    async with SmallRouter() as router, running(make_config(tmp_path, router)) as replica:
        link = await router.attached()
        link.submit(1, max_tokens=200)
        await link.wait(lambda: link.token_ids(1), "the first token")
        drain = asyncio.create_task(replica.supervisor.drain("scale down"))
        await link.wait(lambda: link.draining, "Draining")
        link.submit(2, max_tokens=5)
        last = await link.finished(2)
        assert (last.finish, last.error.code) == (link_pb2.ENGINE_FINISH_ERROR, "UNAVAILABLE")
        await drain
        assert (await link.finished(1)).finish == link_pb2.ENGINE_FINISH_LENGTH
        await link.billed(1)
        assert link.draining == "scale down"
        await replica.supervisor.stop("scaled down")
        await link.ended()
        assert link.goodbye == link_pb2.Goodbye(reason="scaled down")
        assert replica.fatal_reasons == []


async def test_a_group_that_cannot_start_leaves_nothing_behind(tmp_path: Path) -> None:
    async with SmallRouter() as router:
        config = replace(make_config(tmp_path, router), null=replace(NULL, fail_at_step=1))
        group = SubprocessRankGroup(runtime_dir=Path(config.runtime_dir))
        supervisor = Supervisor(config, group, lambda _reason: None, epoch=7)
        with pytest.raises(RankLost, match="the engine failed"):
            await supervisor.start()
        assert_nothing_left(Replica(supervisor=supervisor, config=config))


async def test_idle_replicas_beat(tmp_path: Path) -> None:
    async with SmallRouter() as router, running(make_config(tmp_path, router)):
        link = await router.attached()
        await link.wait(
            lambda: link.num_heartbeats >= 3 and link.loads[-1].power_w > 0, "heartbeats with power"
        )
        assert link.loads[-1].free_blocks == link.loads[-1].total_blocks
