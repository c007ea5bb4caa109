"""A two-rank null group as real processes: socket to rank 0, plan ring between them, every way to end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from replicas.config import EngineLimits, NullEngineConfig, ParallelConfig, RankConfig
from replicas.errors import RankLost
from replicas.frames import Cancel, Shutdown, Stop, Submit
from replicas.rank.null_runner import null_continuation
from replicas.request import FinishReason, GenerationRequest
from tests.live_ranks import LiveGroup, open_group

pytestmark = pytest.mark.processes

FAST = NullEngineConfig(step_ms=1.0, vocab_size=500, context_tokens=100_000)
NUM_BLOCKS = 16_384
ENDLESS = 90_000
"""Tokens of an answer that is under way for a minute and a half, unless it is ended."""
TWO_RANKS = ParallelConfig(tensor=2)
OpenNullGroup = Callable[..., AbstractAsyncContextManager[LiveGroup]]


@pytest.fixture
def open_null_group(tmp_path: Path) -> OpenNullGroup:
    def start(
        null: NullEngineConfig = FAST, *, lookahead: int = 0, parallel: ParallelConfig = TWO_RANKS
    ) -> AbstractAsyncContextManager[LiveGroup]:
        config = RankConfig(
            group="test/group",
            epoch=3,
            rank=0,
            source="null",
            parallel=parallel,
            limits=EngineLimits(max_sequences=8, num_blocks=NUM_BLOCKS, lookahead=lookahead),
            null=null,
            socket_path=str(tmp_path / "rank0.sock"),
            shared_dir=str(tmp_path),
        )
        return open_group(config)

    return start


def make_request(request_id: int, max_tokens: int) -> GenerationRequest:
    return GenerationRequest(request_id=request_id, prompt_ids=(5, 6, 7, request_id), max_tokens=max_tokens)


@pytest.mark.parametrize("lookahead", [0, 1])
async def test_a_group_serves_and_shuts_down(
    open_null_group: OpenNullGroup, tmp_path: Path, lookahead: int
) -> None:
    async with open_null_group(lookahead=lookahead) as group:
        ready = await group.read_ready()
        assert (ready.architecture, ready.vocab_size, ready.eos_token_ids) == ("null", 500, (2,))
        assert ready.load.running == (0,)
        assert ready.load.free_blocks == ready.load.total_blocks == (NUM_BLOCKS - 1,)
        assert [path.name for path in tmp_path.iterdir()] == ["rank0.sock"]

        await group.send(Submit(request=make_request(1, 20)))
        await group.send(Submit(request=make_request(2, ENDLESS)))
        await group.send(Submit(request=make_request(3, ENDLESS)))
        await group.read_until(lambda seen: 1 in seen.finishes)
        await group.send(Cancel(request_id=2))
        await group.send(Stop(request_id=3))
        await group.read_until(lambda seen: len(seen.finishes) == 3)
        assert group.finishes == {1: FinishReason.LENGTH, 2: FinishReason.CANCELLED, 3: FinishReason.STOP}
        for request_id, tokens in group.tokens.items():
            prompt_ids = make_request(request_id, 1).prompt_ids
            assert tuple(tokens) == null_continuation(prompt_ids, len(tokens), FAST)

        await group.send(Shutdown())
        assert await group.exit_codes() == [0, 0]
        with pytest.raises(RankLost):
            while True:
                await group.read()


async def test_lanes_have_a_cache_each(open_null_group: OpenNullGroup) -> None:
    async with open_null_group(parallel=ParallelConfig(expert=2, layout="dispatch")) as group:
        ready = await group.read_ready()
        assert (ready.lanes, ready.load.free_blocks, ready.load.running) == (2, (NUM_BLOCKS - 1,) * 2, (0, 0))
        for request_id in (1, 2, 3):
            request = replace(make_request(request_id, 30), lane=1 if request_id == 3 else 0)
            await group.send(Submit(request=request))
        await group.send(Submit(request=replace(make_request(4, 5), lane=2)))
        await group.read_until(lambda seen: len(seen.finishes) == 4)
        assert group.last[4].error == ("INVALID_ARGUMENT", "lane is 2; this engine has lanes 0 to 1")
        for request_id in (1, 2, 3):
            wanted = null_continuation(make_request(request_id, 1).prompt_ids, 30, FAST)
            assert tuple(group.tokens[request_id]) == wanted
        await group.send(Shutdown())
        assert await group.exit_codes() == [0, 0]


async def test_a_killed_follower_fails_the_group(open_null_group: OpenNullGroup) -> None:
    async with open_null_group() as group:
        await group.read_ready()
        await group.send(Submit(request=make_request(1, ENDLESS)))
        await group.read_step()
        group.ranks[1].send_signal(signal.SIGKILL)
        failure = await group.read_failure()
        assert failure.reason == "RankLost: the process of rank 1 ended"
        assert await group.exit_codes() == [1, -signal.SIGKILL]


async def test_a_closed_socket_ends_every_rank(open_null_group: OpenNullGroup) -> None:
    async with open_null_group() as group:
        await group.read_ready()
        group.writer.close()
        assert await group.exit_codes() == [1, 1]


async def test_a_failing_step_is_told_before_the_ranks_end(open_null_group: OpenNullGroup) -> None:
    async with open_null_group(replace(FAST, fail_at_step=6)) as group:
        await group.read_ready()
        await group.send(Submit(request=make_request(1, ENDLESS)))
        failure = await group.read_failure()
        assert failure.reason == "RuntimeError: the null engine was told to fail at step 6"
        assert await group.exit_codes() == [1, 1]


async def test_idle_ranks_use_no_processor(open_null_group: OpenNullGroup) -> None:
    async with open_null_group() as group:
        await group.read_ready()
        await group.send(Submit(request=make_request(1, 5)))
        await group.read_until(lambda seen: 1 in seen.finishes)
        before_s = [cpu_s(rank.pid) for rank in group.ranks]
        await asyncio.sleep(1.0)  # The thing measured: what a second of idleness costs.
        after_s = [cpu_s(rank.pid) for rank in group.ranks]
        assert max(after - before for before, after in zip(before_s, after_s, strict=True)) <= 0.1


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
