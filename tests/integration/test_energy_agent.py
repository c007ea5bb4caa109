"""The energy agent as a real process on a Unix socket, measuring real processes; and its restarts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from protos import wattline_energy_pb2 as wire
from protos.wattline_energy_pb2_grpc import EnergyAgentStub
from replicas.energy.agent import EnergyAgent
from replicas.energy.agent_client import watch_readings
from replicas.energy.meter import MeterScope, Reading, Source
from replicas.energy.open_meter import MeterSettings
from replicas.energy.replay import FakeMeter
from replicas.energy.watch_key import WatchKey
from replicas.errors import MeterUnavailable

WAIT_S = 100.0


@pytest.fixture
def socket_address(tmp_path: Path) -> str:
    return f"unix:{tmp_path / 'energy.sock'}"


@pytest.fixture
def busy_pid() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process.pid
    process.kill()
    process.wait()


@asynccontextmanager
async def running_agent(address: str, *, poll_s: float = 0.01) -> AsyncIterator[EnergyAgent]:
    agent = EnergyAgent(poll_s=poll_s)
    await agent.start(address)
    try:
        yield agent
    finally:
        await agent.stop()


async def take_until(address: str, is_enough: Callable[[list[Reading]], bool], **watch: Any) -> list[Reading]:
    readings = []
    async with asyncio.timeout(WAIT_S), aclosing(watch_readings(address, group="test", **watch)) as stream:
        async for reading in stream:
            readings.append(reading)
            if is_enough(readings):
                break
    return readings


async def take(address: str, count: int, **watch: Any) -> list[Reading]:
    return await take_until(address, lambda readings: len(readings) == count, **watch)


@pytest.mark.processes
async def test_a_real_agent_measures_a_busy_process(socket_address: str, busy_pid: int) -> None:
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "replicas.energy.agent", "--listen", socket_address, "--poll-ms", "20"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert (
            await asyncio.to_thread(process.stdout.readline) == f"energy agent listens on {socket_address}\n"
        )
        start_s = time.monotonic()
        readings = await take_until(socket_address, has_seen_it_busy, pids=[busy_pid])
        watched_s = time.monotonic() - start_s
        process.terminate()
        assert await asyncio.to_thread(process.wait, WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
    assert not Path(socket_address.removeprefix("unix:")).exists()
    assert readings[0].energy_mj == 0
    for earlier, later in pairwise(readings):
        assert later.t_ns > earlier.t_ns
        assert later.energy_mj >= earlier.energy_mj
        assert not later.gap
    assert {reading.source for reading in readings} == {Source.TDP}
    last = readings[-1]
    seconds = (last.t_ns - readings[0].t_ns) / 1e9
    assert last.static_mj == pytest.approx(10_000 * seconds, abs=2)
    # One busy core at 8 W at most. The agent may pause between looking at its clock and at the process.
    assert last.static_mj is not None and last.energy_mj - last.static_mj <= 8_100 * watched_s


def has_seen_it_busy(readings: list[Reading]) -> bool:
    """When it got a core, and how much of one, is up to the machine."""
    last = readings[-1]
    return len(readings) >= 20 and last.energy_mj > (last.static_mj or 0) + 100


async def test_a_restarted_agent_is_found_again_with_a_gap(socket_address: str, busy_pid: int) -> None:
    readings: list[Reading] = []
    async with asyncio.timeout(WAIT_S):
        stream = watch_readings(socket_address, group="test", pids=[busy_pid])
        async with aclosing(stream):
            async with running_agent(socket_address):
                readings.append(await anext(stream))
            async with running_agent(socket_address):
                while not readings[-1].gap:
                    readings.append(await anext(stream))
                readings.append(await anext(stream))
    assert [reading.gap for reading in readings].count(True) == 1
    assert all(a.energy_mj <= b.energy_mj and a.t_ns < b.t_ns for a, b in pairwise(readings))


async def test_watchers_of_the_same_processes_share_a_meter(socket_address: str, busy_pid: int) -> None:
    async with running_agent(socket_address) as agent:
        async with asyncio.timeout(WAIT_S):
            await until_shared(socket_address, busy_pid)
            assert agent.cpu_share > 0.0
            while list(Path(socket_address.removeprefix("unix:")).parent.glob("*.edges-*")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def until_shared(address: str, pid: int) -> None:
    """Until two watchers have been told the same edge: of two meters, no times are the same."""
    watches = [watch_readings(address, group="test", pids=[pid]) for _ in range(2)]
    async with aclosing(watches[0]) as first, aclosing(watches[1]) as second:
        begun = [await anext(first), await anext(second)]
        assert [reading.energy_mj for reading in begun] == [0, 0]
        seen: tuple[set[int], set[int]] = set(), set()
        while not seen[0] & seen[1]:
            for times, watch in zip(seen, (first, second), strict=True):
                times.add((await anext(watch)).t_ns)


async def test_a_watch_that_nothing_can_serve_says_why(socket_address: str) -> None:
    async with running_agent(socket_address):
        with pytest.raises(MeterUnavailable, match="name gpu_uuids, or pids"):
            await take(socket_address, 1)
        with pytest.raises(MeterUnavailable, match="meter='abacus'; give one of auto, nvml"):
            await take(socket_address, 1, meter="abacus", pids=[1])
        with pytest.raises(MeterUnavailable, match="1024 is the limit"):
            await take(socket_address, 1, pids=list(range(1025)))


async def test_gpus_that_cannot_be_read_are_never_answered_with_an_estimate_of_the_cpus(
    socket_address: str, busy_pid: int
) -> None:
    async with running_agent(socket_address):
        with pytest.raises(MeterUnavailable, match=r"NVML|not on this host"):
            await take(socket_address, 1, gpu_uuids=["GPU-00000000"], pids=[busy_pid])


async def test_an_edge_tells_what_the_host_drew_beside_the_devices(
    socket_address: str, tmp_path: Path
) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "262143328850"), ("energy_uj", "0")):
        (package / name).write_text(text)
    agent = EnergyAgent(poll_s=0.01, powercap_dir=tmp_path)
    await agent.start(socket_address)
    hosts_mj = []
    try:
        stream = watch_readings(socket_address, group="test", meter="fake")
        async with asyncio.timeout(WAIT_S), aclosing(stream):
            async for reading in stream:
                if reading.host_mj == 0:
                    with (package / "energy_uj").open("r+") as counter:
                        counter.write("1000999")
                hosts_mj.append(reading.host_mj)
                if reading.host_mj:
                    break
    finally:
        await agent.stop()
    assert set(hosts_mj) == {None, 0, 1_000}
    assert hosts_mj[0] is None


async def test_a_counter_of_the_host_that_hangs_holds_up_nothing_and_is_taken_when_it_answers(
    socket_address: str, tmp_path: Path
) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "262143328850")):
        (package / name).write_text(text)
    count = package / "energy_uj"
    os.mkfifo(count)
    agent = EnergyAgent(poll_s=0.01, powercap_dir=tmp_path)
    await agent.start(socket_address)
    try:
        stream = watch_readings(socket_address, group="test", meter="fake")
        async with asyncio.timeout(WAIT_S), aclosing(stream):
            assert [(await anext(stream)).host_mj for _ in range(3)] == [None] * 3
            pipe = await asyncio.to_thread(os.open, count, os.O_WRONLY)
            count.unlink()
            count.write_text("7000000")
            os.write(pipe, b"7000000")
            os.close(pipe)
            while (await anext(stream)).host_mj is None:
                pass
    finally:
        await agent.stop()


async def test_the_cpus_of_a_module_are_not_counted_twice(
    socket_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_meter(key: WatchKey, _: MeterSettings) -> FakeMeter:
        meter = FakeMeter(((0, 100.0),))
        meter.scope = MeterScope.HOST if key.meter == "rapl" else MeterScope.MODULE
        return meter

    monkeypatch.setattr("replicas.energy.agent.open_meter", make_meter)
    async with (
        asyncio.timeout(WAIT_S),
        running_agent(socket_address),
        aclosing(watch_readings(socket_address, group="gh200")) as stream,
    ):
        await anext(stream)
        with pytest.raises(MeterUnavailable, match="meter of gh200 counts the same CPUs"):
            await take(socket_address, 1, meter="rapl")


async def test_the_fake_meter_is_labelled_fake(socket_address: str) -> None:
    async with running_agent(socket_address):
        (reading,) = await take(socket_address, 1, meter="fake")
        assert reading.source is Source.FAKE


async def test_a_second_agent_does_not_take_a_living_ones_socket(socket_address: str) -> None:
    async with running_agent(socket_address):
        with pytest.raises(OSError, match="already listens"):
            await EnergyAgent().start(socket_address)


async def test_an_agent_that_nobody_watches_ends(socket_address: str) -> None:
    agent = EnergyAgent(exit_after_idle_s=0.05)
    await agent.start(socket_address)
    await asyncio.wait_for(agent.serve_until_unused(), WAIT_S)
    assert not Path(socket_address.removeprefix("unix:")).exists()


async def test_describe_says_what_can_be_measured(socket_address: str) -> None:
    async with running_agent(socket_address), aio.insecure_channel(socket_address) as channel:
        response = await EnergyAgentStub(channel).DescribeMeters(wire.DescribeMetersRequest())
    meters = {meter.name: meter for meter in response.meters}
    assert meters["cpu-model"].available
    assert meters["cpu-model"].source == "tdp"
    assert meters["nvml"].available or meters["nvml"].detail


async def test_a_cancelled_watch_leaves_no_poller_behind(socket_address: str, busy_pid: int) -> None:
    async with running_agent(socket_address), aio.insecure_channel(socket_address) as channel:
        call = EnergyAgentStub(channel).Watch(wire.WatchEnergyRequest(group="test", pids=[busy_pid]))
        await call.read()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()
        async with asyncio.timeout(WAIT_S):
            while any("energy-poll" in thread.name for thread in threading.enumerate()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def test_the_command_line_teaches() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "replicas.energy.agent", "--help"], capture_output=True, text=True, check=True
    )
    assert "--exit-after-idle-s" in shown.stdout
    assert "unix:/path or host:port" in shown.stdout
    refused = subprocess.run(
        [sys.executable, "-m", "replicas.energy.agent", "--listen", "unix:/x", "--poll-ms", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "poll_s=0.0: give 0.001 to 1.0" in refused.stderr


async def test_tcp_addresses_get_their_port_filled_in() -> None:
    agent = EnergyAgent(poll_s=0.01)
    (address,) = await agent.start("127.0.0.1:0")
    try:
        (reading,) = await take(address, 1, meter="fake")
    finally:
        await agent.stop()
    assert not address.endswith(":0")
    assert reading.energy_mj == 0


def test_a_poll_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"poll_s=5\.0: give"):
        EnergyAgent(poll_s=5.0)
