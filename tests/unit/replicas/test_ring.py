"""The plan channel, on one host (ring) and between hosts (TCP): order, bounds, death, epochs."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from replicas.errors import RankLost
from replicas.parallel.channel import PlanFollower, PlanLeader, StepReply
from replicas.parallel.ring import REPLY_SLOTS, RingFollower, RingLeader, _Layout
from replicas.parallel.shared_file import HEADER_BYTES, _make
from replicas.parallel.tcp import TcpFollower, TcpLeader

RING_BYTES = 1024
ATTACH_TIMEOUT_S = 100.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=8) as executor:
        yield executor


def open_ring(
    folder: Path, pool: ThreadPoolExecutor, *, size: int = 2, timeout_s: float = 100.0, epoch: int = 7
) -> tuple[RingLeader, list[RingFollower]]:
    path = folder / "group.plans"
    leader: Future[RingLeader] = pool.submit(
        RingLeader,
        path,
        size=size,
        epoch=epoch,
        attach_timeout_s=ATTACH_TIMEOUT_S,
        timeout_s=timeout_s,
        ring_bytes=RING_BYTES,
    )
    followers = [
        pool.submit(
            RingFollower,
            path,
            rank=rank,
            size=size,
            epoch=epoch,
            attach_timeout_s=ATTACH_TIMEOUT_S,
            ring_bytes=RING_BYTES,
        )
        for rank in range(1, size)
    ]
    return leader.result(), [follower.result() for follower in followers]


def open_tcp(
    pool: ThreadPoolExecutor, *, size: int = 2, timeout_s: float = 100.0
) -> tuple[TcpLeader, list[TcpFollower]]:
    listener = socket.create_server(("127.0.0.1", 0))
    address = ("127.0.0.1", listener.getsockname()[1])
    leader: Future[TcpLeader] = pool.submit(
        TcpLeader, listener, size=size, epoch=7, attach_timeout_s=ATTACH_TIMEOUT_S, timeout_s=timeout_s
    )
    followers = [
        TcpFollower(address, rank=rank, size=size, epoch=7, attach_timeout_s=ATTACH_TIMEOUT_S)
        for rank in range(1, size)
    ]
    return leader.result(), followers


def make_reply(step: int, rank: int = 1) -> StepReply:
    return StepReply(step=step, compute_us=100 * rank, experts_hit=rank, digest=step ^ 0xFFFF_FFFF)


def answer_all(follower: PlanFollower, rank: int) -> list[bytes]:
    """Reply to every message until the leader closes; what was received."""
    received: list[bytes] = []
    while (payload := follower.receive()) is not None:
        received.append(payload)
        follower.reply(make_reply(len(received), rank))
    return received


def exchange(leader: PlanLeader, followers: list[PlanFollower], pool: ThreadPoolExecutor) -> None:
    """Many messages of all sizes arrive everywhere in order, and every reply comes back."""
    messages = [bytes([index % 256]) * (index * 7 % 1500) for index in range(200)]
    received = [pool.submit(answer_all, follower, rank) for rank, follower in enumerate(followers, 1)]
    for step, message in enumerate(messages, 1):
        leader.publish(message)
        assert leader.collect() == tuple(make_reply(step, rank) for rank in range(1, len(followers) + 1))
    leader.close()
    assert [future.result() for future in received] == [messages] * len(followers)


def test_ring_delivers_every_message_in_order_to_all_followers(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    leader, followers = open_ring(tmp_path, pool, size=4)
    exchange(leader, [*followers], pool)


def test_tcp_delivers_every_message_in_order_to_all_followers(pool: ThreadPoolExecutor) -> None:
    leader, followers = open_tcp(pool, size=4)
    exchange(leader, [*followers], pool)


def test_the_file_is_gone_once_all_are_attached(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    open_ring(tmp_path, pool)
    assert list(tmp_path.iterdir()) == []


def test_several_plans_can_be_under_way(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    leader, (follower,) = open_ring(tmp_path, pool)
    assert not follower.has_message()
    for step in (1, 2, 3):
        leader.publish(bytes([step]))
    assert follower.has_message()
    for step in (1, 2, 3):
        assert follower.receive() == bytes([step])
    assert not follower.has_message()
    for step in (1, 2, 3):
        follower.reply(make_reply(step))
    assert [leader.collect() for _ in range(3)] == [(make_reply(step),) for step in (1, 2, 3)]


def test_publishing_past_the_reply_slots_is_caught(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    leader, _ = open_ring(tmp_path, pool)
    for _ in range(REPLY_SLOTS):
        leader.publish(b"")
    with pytest.raises(AssertionError, match="replies are collected"):
        leader.publish(b"")


def test_a_plan_longer_than_the_ring_goes_through_while_it_is_read(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    leader, (follower,) = open_ring(tmp_path, pool)
    plans = [bytes(range(256)) * num_quarters for num_quarters in (1, 4, 13)]
    for plan in plans:
        published = pool.submit(leader.publish, plan)
        assert follower.receive() == plan
        published.result()
    for step in range(len(plans)):
        follower.reply(make_reply(step))
    assert [leader.collect() for _ in plans] == [(make_reply(step),) for step in range(len(plans))]


def test_a_follower_that_lags_a_whole_ring_is_lost(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    leader, _ = open_ring(tmp_path, pool, timeout_s=0.05)
    leader.publish(bytes(500))
    leader.publish(bytes(500))
    with pytest.raises(RankLost, match=r"rank 1 kept rank 0 waiting for 0\.05 s"):
        leader.publish(bytes(500))


def test_a_leader_waits_for_the_space_that_a_follower_makes(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    leader, (follower,) = open_ring(tmp_path, pool)
    leader.publish(bytes(500))
    leader.publish(bytes(500))
    third = pool.submit(leader.publish, b"third")
    assert [follower.receive() for _ in range(3)] == [bytes(500), bytes(500), b"third"]
    third.result()


def test_a_follower_that_does_not_answer_is_lost(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    leader, _ = open_ring(tmp_path, pool, timeout_s=0.05)
    leader.publish(b"plan")
    with pytest.raises(RankLost, match="rank 1 kept rank 0 waiting"):
        leader.collect()
    tcp_leader, _followers = open_tcp(pool, timeout_s=0.05)
    tcp_leader.publish(b"plan")
    with pytest.raises(RankLost, match=r"rank 1 at 127\.0\.0\.1 kept rank 0 waiting for 0\.05 s"):
        tcp_leader.collect()


def test_a_follower_that_failed_says_so(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    leader, (follower,) = open_ring(tmp_path, pool)
    leader.publish(b"plan")
    follower.fail()
    with pytest.raises(RankLost, match="rank 1 failed"):
        leader.collect()
    tcp_leader, (tcp_follower,) = open_tcp(pool)
    tcp_leader.publish(b"plan")
    tcp_follower.fail()
    with pytest.raises(RankLost, match=r"rank 1 at 127\.0\.0\.1 is gone"):
        tcp_leader.collect()


def test_a_rank_that_never_attaches_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match=r"ranks \[1, 2\] did not attach"):
        RingLeader(tmp_path / "plans", size=3, epoch=1, attach_timeout_s=0.02, timeout_s=1.0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RankLost, match=r"rank 1: rank 0 did not open"):
        RingFollower(tmp_path / "plans", rank=1, size=3, epoch=1, attach_timeout_s=0.02)
    with pytest.raises(RankLost, match=r"ranks \[1, 2\] did not attach"):
        TcpLeader(
            socket.create_server(("127.0.0.1", 0)), size=3, epoch=1, attach_timeout_s=0.02, timeout_s=1.0
        )


def test_what_a_dead_group_left_behind_is_replaced(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    stale = tmp_path / "group.plans"
    layout = _Layout(1, RING_BYTES)
    _make(stale, HEADER_BYTES + layout.num_bytes, size=2, epoch=7)
    leader, (follower,) = open_ring(tmp_path, pool)
    leader.publish(b"new life")
    assert follower.receive() == b"new life"
    assert not stale.exists()


def test_tcp_turns_away_a_follower_of_another_life(pool: ThreadPoolExecutor) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = ("127.0.0.1", listener.getsockname()[1])
    leader = pool.submit(
        TcpLeader, listener, size=2, epoch=7, attach_timeout_s=ATTACH_TIMEOUT_S, timeout_s=1.0
    )
    stale = TcpFollower(address, rank=1, size=2, epoch=6, attach_timeout_s=ATTACH_TIMEOUT_S)
    with pytest.raises(RankLost, match="rank 0 is gone"):
        stale.receive()
    TcpFollower(address, rank=1, size=2, epoch=7, attach_timeout_s=ATTACH_TIMEOUT_S)
    leader.result().close()


def test_a_host_that_vanishes_ends_both_sides_of_a_connection(pool: ThreadPoolExecutor) -> None:
    """Without a packet from it nothing else would: the kernel is told to probe, and to give up."""
    leader, (follower,) = open_tcp(pool)
    for connection in (*leader._connections, follower._connection):
        options = {
            name: connection.getsockopt(level, getattr(socket, name))
            for level, name in (
                (socket.SOL_SOCKET, "SO_KEEPALIVE"),
                (socket.IPPROTO_TCP, "TCP_KEEPIDLE"),
                (socket.IPPROTO_TCP, "TCP_KEEPINTVL"),
                (socket.IPPROTO_TCP, "TCP_KEEPCNT"),
                (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT"),
            )
        }
        assert options == {
            "SO_KEEPALIVE": 1,
            "TCP_KEEPIDLE": 2,
            "TCP_KEEPINTVL": 2,
            "TCP_KEEPCNT": 3,
            "TCP_USER_TIMEOUT": 8000,
        }


def test_an_idle_follower_uses_no_processor(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    leader, (follower,) = open_ring(tmp_path, pool)
    used_s: list[float] = []

    def receive_idle() -> None:
        start_s = time.thread_time()
        follower.receive()
        used_s.append(time.thread_time() - start_s)

    thread = threading.Thread(target=receive_idle)
    thread.start()
    time.sleep(1.0)  # The thing measured: what a second of idleness costs.
    leader.close()
    thread.join()
    assert used_s[0] < 0.1


DYING_FOLLOWER = """
import sys
from pathlib import Path
from replicas.parallel.ring import RingFollower
follower = RingFollower(Path(sys.argv[1]), rank=1, size=2, epoch=1, attach_timeout_s=100.0)
follower.receive()
print("received", flush=True)
follower.receive()
"""

DYING_LEADER = """
import os, sys
from pathlib import Path
from replicas.parallel.ring import RingLeader
leader = RingLeader(Path(sys.argv[1]), size=2, epoch=1, attach_timeout_s=100.0, timeout_s=100.0)
print("attached", flush=True)
sys.stdin.read(1)
os.abort()
"""


@pytest.mark.processes
def test_a_killed_follower_is_noticed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "plans"
    child = subprocess.Popen([sys.executable, "-c", DYING_FOLLOWER, str(path)], stdout=subprocess.PIPE)
    try:
        leader = RingLeader(path, size=2, epoch=1, attach_timeout_s=100.0, timeout_s=60.0)
        leader.publish(b"plan")
        assert child.stdout is not None and child.stdout.readline() == b"received\n"
        child.kill()
        with pytest.raises(RankLost, match="the process of rank 1 ended"):
            leader.collect()
    finally:
        child.kill()
        child.communicate()


@pytest.mark.processes
def test_a_follower_does_not_outlive_its_leader(tmp_path: Path) -> None:
    path = tmp_path / "plans"
    child = subprocess.Popen(
        [sys.executable, "-c", DYING_LEADER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        follower = RingFollower(path, rank=1, size=2, epoch=1, attach_timeout_s=100.0)
        assert child.stdin is not None
        child.stdin.write(b"x")
        child.stdin.flush()
        with pytest.raises(RankLost, match="the process of rank 0 ended"):
            follower.receive()
    finally:
        child.kill()
        child.communicate()
