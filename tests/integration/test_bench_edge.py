"""The servers of the edge bench: each comes up, streams, is watched, and leaves."""

from __future__ import annotations

import psutil
import pytest

from bench.edge.child import Child, ServerFailed
from bench.edge.flood import Flood, until_calm, watch_flood
from bench.edge.line import NullModel, running_line

pytestmark = pytest.mark.processes


def make_flood(*addresses: str) -> Flood:
    return Flood(addresses=addresses, model="null", streams=3, output_tokens=100, window_s=0.2)


async def test_echo_and_relay_stream_and_end_with_the_bench() -> None:
    async with (
        Child("bench.edge.echo_server") as echo,
        Child("bench.edge.relay_server", (echo.address,)) as relay,
    ):
        for server in (echo, relay):
            watched = await watch_flood(make_flood(server.address), server.pids)
            assert len(watched.tokens) == 3
            assert sum(watched.tokens) == watched.num_messages
        await until_calm(echo.pids)
    assert not any(map(psutil.pid_exists, (echo.pids["server"], relay.pids["relay"])))


async def test_two_routers_share_one_replica_and_all_end_with_the_bench() -> None:
    model = NullModel(name="null", step_ms=1.0, streams=3, vocab_size=1000, context_tokens=256)
    async with running_line((model,), routers=2) as line:
        pids = {**line.router_pids, **line.replica_pids["null"]}
        watched = await watch_flood(make_flood(*line.addresses), pids)
    assert len(watched.tokens) == 3
    assert set(watched.cpu_s) == {"router-0", "router-1", "supervisor", "rank"}
    assert not any(map(psutil.pid_exists, pids.values()))


async def test_a_server_that_does_not_come_up_says_why() -> None:
    with pytest.raises(
        ServerFailed, match=r"bench\.edge\.null_replica did not come up[\s\S]*JSONDecodeError"
    ):
        async with Child("bench.edge.null_replica", ("no plan",)):
            pass
