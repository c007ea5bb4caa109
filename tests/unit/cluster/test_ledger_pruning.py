"""What the ledger store forgets, and what it must not: requests of hours that still come in."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from cluster.config.ledger import LedgerSection
from cluster.ledger.database import DAY_S, HOUR_S, Database
from cluster.ledger.process import prune_until
from cluster.ledger.service import LedgerServicer
from tests.ledger_entries import make_entry

NOW_S = 1000.5 * HOUR_S
FULL = 1000


def prune(database: Database, *, now_s: float = NOW_S) -> int:
    return database.prune(now_s=now_s, request_days=30.0, sums_days=400.0, max_requests=FULL)


def num_requests(database: Database) -> int:
    return sum(sums.num_requests for sums in database.summarize(since_s=0.0, until_s=NOW_S + 1).requests)


def test_an_hour_of_too_many_requests_is_counted_to_its_end(tmp_path: Path) -> None:
    database = Database(tmp_path / "ledger.db")
    database.record([make_entry(f"r{number}", ended_s=NOW_S - 1) for number in range(FULL + 500)], [])
    prune(database)
    assert database.record([make_entry("after the pruning", ended_s=NOW_S)], []) == 1
    assert database.record([make_entry("late", ended_s=NOW_S - 0.6 * HOUR_S)], []) == 1
    assert num_requests(database) == FULL + 502
    database.close()


def test_requests_of_hours_that_are_over_go_when_they_are_too_many(tmp_path: Path) -> None:
    database = Database(tmp_path / "ledger.db")
    for hours in (2, 3):
        ended_s = NOW_S - hours * HOUR_S
        database.record([make_entry(f"{hours}/{number}", ended_s=ended_s) for number in range(600)], [])
    assert prune(database) == 600
    assert num_requests(database) == 1200, "their hours are kept"
    database.close()


def test_a_clock_that_was_ahead_costs_nothing_of_what_comes_after(tmp_path: Path) -> None:
    database = Database(tmp_path / "ledger.db")
    prune(database, now_s=NOW_S + 365 * DAY_S)
    assert database.record([make_entry("while it is ahead", ended_s=NOW_S)], []) == 0
    prune(database)
    assert database.record([make_entry("set right", ended_s=NOW_S)], []) == 1
    assert num_requests(database) == 1
    database.close()


async def test_a_file_that_cannot_be_pruned_now_is_pruned_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.ledger.process.PRUNE_PERIOD_S", 0.01)
    monkeypatch.setattr("cluster.ledger.database.BUSY_TIMEOUT_S", 0.0)
    path = tmp_path / "ledger.db"
    database = Database(path)
    database.record([make_entry(ended_s=NOW_S)], [])  # Of 1970: long over.
    servicer = LedgerServicer(database, wall_s=lambda: NOW_S)
    reader = Database(path, read_only=True)
    stopping = asyncio.Event()
    other = sqlite3.connect(path)
    other.execute("BEGIN IMMEDIATE")
    pruning = asyncio.create_task(prune_until(stopping, servicer, database, LedgerSection()))
    async with asyncio.timeout(60):
        while "ledger_not_pruned error=database is locked" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        other.rollback()
        while list(reader.list_requests(since_s=0.0, until_s=NOW_S + 1)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    stopping.set()
    await pruning
    other.close()
    reader.close()
    servicer.close()
