"""Which sums of replicas a router tells the ledger store: those that are news, and all of them in the end."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.ledger.database import Database
from cluster.ledger.entries import ReplicaSums
from cluster.ledger.recorder import BATCH, LedgerRecorder
from cluster.ledger.service import LedgerServicer
from protos import wattline_ledger_pb2 as pb
from protos import wattline_ledger_pb2_grpc as pb_grpc
from tests.ledger_entries import make_replica_sums

WAIT_S = 60.0


class Store(LedgerServicer):
    """Remembers whose sums it was told."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, wall_s=time.time)
        self.told: list[str] = []

    async def Record(self, request: pb.RecordRequest, context: Any) -> pb.RecordResponse:  # noqa: N802
        self.told += [one.replica_id for one in request.replicas]
        return await super().Record(request, context)


class Book:
    """The sums of a router that it is asked for; counts how often."""

    def __init__(self, sums: list[ReplicaSums]) -> None:
        self.sums = sums
        self.num_asked = 0

    def read(self) -> list[ReplicaSums]:
        self.num_asked += 1
        return self.sums

    async def asked_again(self, times: int) -> None:
        asked = self.num_asked
        async with asyncio.timeout(WAIT_S):
            while self.num_asked < asked + times:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@asynccontextmanager
async def telling(book: Book, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Store]:
    """A recorder that asks `book` all the time and tells a store of it."""
    monkeypatch.setattr("cluster.ledger.recorder.PERIOD_S", 0.01)
    monkeypatch.setattr("cluster.ledger.recorder.SUMS_PERIOD_S", 0.0)
    monkeypatch.setattr("cluster.ledger.recorder.RECORD_TIMEOUT_S", WAIT_S)
    server = grpc.aio.server()
    with tempfile.TemporaryDirectory(prefix="wl-") as folder:
        store = Store(Database(Path(folder) / "ledger.db"))
        pb_grpc.add_LedgerStoreServicer_to_server(store, server)
        address = f"unix:{Path(folder) / 's'}"
        server.add_insecure_port(address)
        await server.start()
        recorder = LedgerRecorder(address, router_id="one", read_sums=book.read)
        recorder.start()
        yield store
        await recorder.close()
        await server.stop(None)
        store.close()


async def test_a_life_that_is_over_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time would be a row a minute in the store, for as long as the router lives."""
    alive = make_replica_sums(replica_id="alive")
    book = Book([make_replica_sums(replica_id="over"), alive])
    async with telling(book, monkeypatch) as store:
        async with asyncio.timeout(WAIT_S):
            while not store.told:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for meter_mj in range(6_000, 9_000, 1_000):
            book.sums = [
                make_replica_sums(replica_id="over", at_s=1e9 + meter_mj),
                make_replica_sums(replica_id="alive", meter_mj=meter_mj),
            ]
            await book.asked_again(3)
    assert store.told.count("over") == 1
    assert store.told.count("alive") == 4


async def test_the_newest_lives_are_told_behind_more_than_a_batch_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"r{number}" for number in range(BATCH + 100)]
    book = Book([make_replica_sums(replica_id=name) for name in names])
    async with telling(book, monkeypatch) as store, asyncio.timeout(WAIT_S):
        while len(store.told) < len(names):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert store.told == names
