"""The ledger store as a process: killed, away, full and back; what was confirmed is never lost."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import yaml

from cluster.config import load_config
from cluster.ledger.database import Database
from cluster.ledger.entries import RequestEntry
from cluster.ledger.location import ledger_address
from cluster.ledger.reading import StoreReader
from cluster.ledger.recorder import LedgerRecorder
from protos import wattline_ledger_pb2 as pb
from protos import wattline_ledger_pb2_grpc as pb_grpc
from tests.ledger_entries import make_entry
from tests.router_fixture import MODEL, collect, make_config, make_request, run_test_router

pytestmark = pytest.mark.processes
WAIT_S = 150.0


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Unix sockets want short paths."""
    with tempfile.TemporaryDirectory(prefix="wl-") as name:
        yield Path(name)


def entry(number: int) -> RequestEntry:
    return make_entry(f"r{number}", ended_s=time.time())


@asynccontextmanager
async def running_store(folder: Path) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    """A store's process and its address, once it answers; the same address for the same folder."""
    config = folder / "wattline.yaml"
    config.write_text(
        yaml.safe_dump({"models": [{"name": "m", "source": "null"}], "runtime_dir": str(folder)})
    )
    address = ledger_address(load_config(config))
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "cluster.ledger", "--config", str(config)]
    )
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            await pb_grpc.LedgerStoreStub(channel).Summarize(
                pb.SummarizeRequest(), timeout=WAIT_S, wait_for_ready=True
            )
        yield process, address
    finally:
        if process.poll() is None:
            process.terminate()
        await asyncio.to_thread(process.wait, WAIT_S)


async def drained(recorder: LedgerRecorder) -> None:
    async with asyncio.timeout(WAIT_S):
        while recorder.num_pending:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_what_was_confirmed_survives_a_kill_and_the_rest_is_sent_again(short_folder: Path) -> None:
    async with running_store(short_folder) as (process, address):
        recorder = LedgerRecorder(address, router_id="one", read_sums=tuple)
        recorder.start()
        for number in range(2500):
            recorder.add(entry(number))
        await drained(recorder)
        process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(process.wait, WAIT_S)
        for number in range(2400, 3000):
            recorder.add(entry(number))
    database = Database(short_folder / "ledger.db", read_only=True)
    assert len(list(database.list_requests(since_s=0.0, until_s=1e11))) == 2500
    database.close()
    async with running_store(short_folder) as (_, address):
        await drained(recorder)
        await recorder.close()
        reader = StoreReader(address)
        (sums,) = (await asyncio.to_thread(reader.summarize, since_s=0.0, until_s=1e11)).requests
        listed = await asyncio.to_thread(lambda: list(reader.list_requests(since_s=0.0, until_s=1e11)))
        reader.close()
    assert sums.num_requests == len(listed) == 3000
    assert sums.energy_mj == 3000 * 4000
    assert recorder.num_dropped == 0


async def test_an_entry_that_cannot_be_true_is_dropped_alone(short_folder: Path) -> None:
    async with running_store(short_folder) as (_, address):
        recorder = LedgerRecorder(address, router_id="one", read_sums=tuple)
        recorder.start()
        for one in (entry(0), replace(entry(1), total_ms=float("nan")), entry(2)):
            recorder.add(one)
        await drained(recorder)
        await recorder.close()
        reader = StoreReader(address)
        (sums,) = (await asyncio.to_thread(reader.summarize, since_s=0.0, until_s=1e11)).requests
        reader.close()
    assert (sums.num_requests, recorder.num_dropped) == (2, 1)


async def test_a_budget_outlives_the_store(short_folder: Path) -> None:
    granted = []
    for _ in range(2):
        async with (
            running_store(short_folder) as (_, address),
            grpc.aio.insecure_channel(address) as channel,
        ):
            store = pb_grpc.LedgerStoreStub(channel)
            answer = await store.LeaseEnergy(
                pb.LeaseEnergyRequest(tenant="a", want_mj=700, budget_mj_per_day=1000)
            )
            granted.append(answer.granted_mj)
            with pytest.raises(grpc.aio.AioRpcError, match="until_s") as refused:
                await store.Summarize(pb.SummarizeRequest(since_s=-1.0))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert granted in ([700, 300], [700, 700])  # The second holds if midnight, UTC, came between.


async def test_a_router_sends_its_closed_requests_and_the_sums_of_its_replicas(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LAST_TIMEOUT_S", "RECORD_TIMEOUT_S"):
        monkeypatch.setattr(f"cluster.ledger.recorder.{name}", WAIT_S)
    config = make_config(runtime_dir=str(short_folder))
    async with running_store(short_folder) as (_, address):
        async with run_test_router(config) as router, router.replica(host_mj=700):
            answer = await collect(router.inference.Generate(make_request(energy_wait_ms=1000)))
        # The router is gone, and what it knew is here.
        reader = StoreReader(address)
        (found,) = await asyncio.to_thread(lambda: list(reader.list_requests(since_s=0.0, until_s=1e11)))
        reader.close()
    assert found.request_id == answer.final.request_id
    assert (found.tenant, found.model, found.outcome) == ("default", MODEL, "length")
    assert found.output_tokens == answer.final.usage.completion_tokens
    assert found.energy is not None
    assert (found.energy.prefill_mj + found.energy.decode_mj) / 1e3 == answer.final.energy.total_j
    assert found.energy.host_mj == 700


async def test_a_second_store_is_refused_and_leaves_the_first_its_socket(short_folder: Path) -> None:
    async with running_store(short_folder) as (_, address):
        second = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "cluster.ledger", "--config", str(short_folder / "wattline.yaml")],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert second.returncode == 2
        assert "another ledger store holds" in second.stderr
        async with grpc.aio.insecure_channel(address) as channel:
            await pb_grpc.LedgerStoreStub(channel).Record(pb.RecordRequest(router_id="r"), timeout=WAIT_S)
