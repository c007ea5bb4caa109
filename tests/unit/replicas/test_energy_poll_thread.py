"""The thread that reads: it stops reading what has ended, and what breaks or hangs is alone in that."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from replicas.energy.agent_metrics import MeterSeries
from replicas.energy.host_meter import HostMeter
from replicas.energy.meter import HEALTHY, Meter, MeterHealth, MeterScope, MeterState, Reading, Source
from replicas.energy.poll_thread import PollThread
from replicas.energy.polling import MeterPoller, Subscriber
from replicas.energy.rapl import RaplMeter
from replicas.energy.read_schedule import ReadSchedule

WAIT_S = 60.0
MS = 1_000_000


class CountingMeter:
    """An edge a read, and a number of them to wait for."""

    edges = None
    scope = MeterScope.DEVICE

    def __init__(self, *, awaited: int) -> None:
        self.num_reads = 0
        self.was_read = threading.Event()
        self.was_closed = threading.Event()
        self.awaited = awaited

    def read(self) -> Reading | None:
        self.num_reads += 1
        if self.num_reads >= self.awaited:
            self.was_read.set()
        return Reading(t_ns=self.num_reads * MS, energy_mj=self.num_reads, source=Source.COUNTER)

    def await_more(self) -> bool:
        """Whether it is read five times more."""
        self.was_read.clear()
        self.awaited = self.num_reads + 5
        return self.was_read.wait(WAIT_S)

    def health(self) -> MeterHealth:
        return HEALTHY

    def close(self) -> None:
        self.was_closed.set()


class BrokenMeter(CountingMeter):
    def read(self) -> Reading | None:
        raise OSError("the bus is gone")


class RaplFiles:
    """A package whose counter can become a pipe that nobody writes: to open it blocks until somebody does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        zone = root / "intel-rapl:0"
        zone.mkdir()
        self._count = zone / "energy_uj"
        for name, text in (("name", "package-0"), ("max_energy_range_uj", "262143328850")):
            (zone / name).write_text(text)
        self._count.write_text("0")

    def block(self) -> None:
        """The open file turns unreadable, so the next read opens the pipe in its place."""
        with self._count.open("r+") as old:
            self._count.unlink()
            os.mkfifo(self._count)
            old.truncate(0)

    def unblock(self) -> None:
        """Who opened the pipe reads nothing, and finds a file of numbers the next time."""
        pipe = os.open(self._count, os.O_WRONLY)
        self._count.unlink()
        self._count.write_text("1000000")
        os.close(pipe)


def make_poller(meter: Meter, group: str = "llama-0") -> MeterPoller:
    return MeterPoller(meter, group=group)


@pytest.fixture
def thread() -> PollThread:
    return PollThread(ReadSchedule(poll_s=0.001), hang_s=0.2)


async def test_a_meter_that_breaks_ends_its_own_watches_with_its_error(thread: PollThread) -> None:
    broken, sound = make_poller(BrokenMeter(awaited=1)), make_poller(CountingMeter(awaited=2))
    watchers = broken.subscribe(), sound.subscribe()
    thread.add(broken)
    thread.add(sound)
    for watcher in (watchers[0], broken.subscribe()):
        with pytest.raises(RuntimeError, match="polling ended") as caught:
            await asyncio.wait_for(watcher.take(), WAIT_S)
        assert isinstance(caught.value.__cause__, OSError)
    assert await asyncio.wait_for(watchers[1].take(), WAIT_S)
    for poller in (broken, sound):
        thread.end(poller)
    thread.close()


def test_a_meter_that_has_ended_is_closed_and_read_no_more_and_the_others_are(thread: PollThread) -> None:
    ended, kept = CountingMeter(awaited=2), CountingMeter(awaited=1)
    pollers = make_poller(ended), make_poller(kept)
    for poller in pollers:
        thread.add(poller)
    assert ended.was_read.wait(WAIT_S)
    thread.end(pollers[0])
    assert ended.was_closed.wait(WAIT_S)
    num_reads = ended.num_reads
    assert kept.await_more()
    assert ended.num_reads == num_reads
    thread.end(pollers[1])
    thread.close()
    assert kept.was_closed.is_set()


def test_meters_are_read_again_after_all_have_ended(thread: PollThread) -> None:
    for _ in range(2):
        meter = CountingMeter(awaited=2)
        poller = make_poller(meter)
        thread.add(poller)
        assert meter.was_read.wait(WAIT_S)
        thread.end(poller)
        assert meter.was_closed.wait(WAIT_S)


async def test_a_read_that_hangs_is_set_aside_and_comes_back_when_it_returns(
    thread: PollThread, tmp_path: Path
) -> None:
    files = RaplFiles(tmp_path)
    stuck, sound = make_poller(RaplMeter(tmp_path), group="rapl"), CountingMeter(awaited=1)
    watcher = stuck.subscribe()
    pollers = stuck, make_poller(sound)
    for poller in pollers:
        thread.add(poller)
    assert isinstance(await asyncio.wait_for(watcher.take(), WAIT_S), list)
    files.block()
    await until_told(watcher, MeterState.LOST)
    assert await asyncio.to_thread(sound.await_more)
    registry = CollectorRegistry()
    registry.register(MeterSeries(lambda: pollers))
    lost = 'wattline_meter_state{hw_id="rapl",state="lost"} 1.0'
    await asyncio.to_thread(wait_until, lambda: lost in generate_latest(registry).decode())
    await until_told(stuck.subscribe(), MeterState.LOST)
    await asyncio.to_thread(files.unblock)
    await until_gap(watcher)
    await asyncio.to_thread(wait_until, lambda: thread.num_hung == 0)
    for poller in pollers:
        thread.end(poller)
    thread.close()


def test_a_meter_whose_read_hangs_ends_without_waiting_and_is_closed_when_it_returns(
    thread: PollThread, tmp_path: Path
) -> None:
    files = RaplFiles(tmp_path)
    poller, sound = make_poller(RaplMeter(tmp_path)), make_poller(CountingMeter(awaited=1))
    for one in (poller, sound):
        thread.add(one)
    files.block()
    wait_until(lambda: thread.num_hung == 1)
    for one in (poller, sound):
        thread.end(one)
    thread.close()
    files.unblock()
    wait_until(lambda: not any(one.name.startswith("energy-") for one in threading.enumerate()))
    assert thread.num_hung == 0


def test_while_the_meter_of_the_host_hangs_edges_come_without_its_part(
    tmp_path: Path,
) -> None:
    files = RaplFiles(tmp_path)
    host = HostMeter(RaplMeter(tmp_path))
    thread = PollThread(ReadSchedule(poll_s=0.001), host=host, hang_s=0.2)
    meter = CountingMeter(awaited=5)
    poller = make_poller(meter)
    poller.sit_at(host)
    thread.add(poller)
    wait_until(lambda: poller.last is not None and poller.last.host_mj is not None)
    files.block()
    wait_until(lambda: thread.num_hung == 1)
    wait_until(lambda: poller.last is not None and poller.last.host_mj is None)
    assert meter.await_more()
    files.unblock()
    wait_until(lambda: poller.last is not None and poller.last.host_mj is not None)
    thread.end(poller)
    thread.close()


async def until_told(watcher: Subscriber, state: MeterState) -> None:
    """Past edges, and past what a machine too busy for `hang_s` makes of other reads."""
    while await asyncio.wait_for(watcher.take(), WAIT_S) is not state:
        pass


async def until_gap(watcher: Subscriber) -> None:
    while True:
        told = await asyncio.wait_for(watcher.take(), WAIT_S)
        if not isinstance(told, MeterState) and any(reading.gap for reading in told):
            return


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
