"""The router child: watched, started again on the same ports, ended; with a stand-in for the router."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.command_error import CommandError
from cluster.config import parse_config
from cluster.serving.router_process import MAX_DEATHS, RouterProcess
from cluster.serving.run_folder import RunFolder

pytestmark = pytest.mark.processes

STAND_IN = '''
"""Listens where it is told and writes down where, as a router does."""
import argparse, json, os, socket, time, yaml
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--addresses")
given = parser.parse_args()
router = yaml.safe_load(Path(given.config).read_text())["router"]
ports = {name: router[name + "_port"] for name in ("grpc", "http", "link")}
sockets = {name: socket.create_server(("127.0.0.1", port)) for name, port in ports.items()}
written = {name: "127.0.0.1:%d" % one.getsockname()[1] for name, one in sockets.items()}
written |= {"router_id": "r", "pid": os.getpid()}
fresh = Path(given.addresses + ".new")
fresh.write_text(json.dumps(written))
fresh.replace(given.addresses)
time.sleep(60)
'''

FAILING = "raise SystemExit('tokenizer folder is empty')"


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def folder() -> Iterator[RunFolder]:
    with tempfile.TemporaryDirectory(prefix="wl-", dir="/tmp") as path:
        yield RunFolder(Path(path))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make_router(
    folder: RunFolder, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], RouterProcess]]:
    made: list[RouterProcess] = []
    config = parse_config(
        {
            "models": [{"name": "m", "source": "null"}],
            "router": {"grpc_port": 0, "http_port": 0, "link_port": 0},
        }
    )

    def make(source: str) -> RouterProcess:
        (folder.path / "stand_in_router.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(folder.path))
        made.append(RouterProcess(config, folder, module="stand_in_router", clock=clock))
        return made[-1]

    yield make
    for router in made:
        router.stop()


def wait_addresses(router: RouterProcess) -> None:
    end_s = time.monotonic() + 120
    while router.poll_addresses() is None:
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_a_dead_router_comes_back_on_the_same_ports(
    make_router: Callable[[str], RouterProcess], clock: FakeClock
) -> None:
    router = make_router(STAND_IN)
    router.start()
    wait_addresses(router)
    first, pid = router.addresses, router.pid
    assert first is not None and pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    router.tend()
    router.tend()
    assert router.pid == pid, "it waits before it starts another"
    clock.now_s += 1.0
    router.tend()
    assert router.pid != pid
    wait_addresses(router)
    assert router.addresses is not None
    assert (router.addresses.grpc, router.addresses.link) == (first.grpc, first.link)
    assert router.addresses.pid == router.pid


def kill(router: RouterProcess) -> int:
    """Returns the pid of what is dead then, and not reaped."""
    pid = router.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def test_a_router_that_cannot_be_started_again_is_tried_again(
    make_router: Callable[[str], RouterProcess], clock: FakeClock, folder: RunFolder
) -> None:
    router = make_router(STAND_IN)
    router.start()
    wait_addresses(router)
    first = kill(router)
    away = folder.path.rename(folder.path.with_name(f"{folder.path.name}-away"))
    try:
        for _ in range(3):
            router.tend()
            clock.now_s += 10.0
    finally:
        away.rename(folder.path)
    assert router.pid == first
    router.tend()
    assert router.pid != first


def test_a_dead_router_is_replaced_before_a_roll_goes_on(make_router: Callable[[str], RouterProcess]) -> None:
    router = make_router(STAND_IN)
    router.start()
    wait_addresses(router)
    first = kill(router)
    router.restart()
    assert router.is_restarting
    end_s = time.monotonic() + 120
    while router.is_restarting:
        router.tend()
        assert time.monotonic() < end_s
        time.sleep(0.02)
    assert router.pid != first


def test_a_router_that_cannot_start_is_quoted(make_router: Callable[[str], RouterProcess]) -> None:
    router = make_router(FAILING)
    router.start()
    assert router.pid is not None
    os.waitid(os.P_PID, router.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(CommandError, match="the router ended with code 1: tokenizer folder is empty; log: "):
        router.poll_addresses()


def test_a_router_that_keeps_dying_is_given_up(
    make_router: Callable[[str], RouterProcess], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.serving.router_process.MAX_DEATHS", 1)
    assert MAX_DEATHS > 1
    router = make_router(FAILING)
    router.start()
    with pytest.raises(CommandError, match="the router died 2 times in a row: tokenizer folder is empty"):
        for _ in range(2):
            assert router.pid is not None
            os.waitid(os.P_PID, router.pid, os.WEXITED | os.WNOWAIT)
            router.tend()
            clock.now_s += 10.0
            router.tend()


def test_stop_leaves_no_process(make_router: Callable[[str], RouterProcess]) -> None:
    router = make_router(STAND_IN)
    router.start()
    wait_addresses(router)
    assert router.pid is not None
    process = psutil.Process(router.pid)
    router.stop()
    assert not process.is_running()
    router.stop()
