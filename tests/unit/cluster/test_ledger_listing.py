"""Requests are listed by pages: whole, in order, and without holding the store's log open."""

from __future__ import annotations

from pathlib import Path

from cluster.ledger.database import Database
from tests.ledger_entries import make_entry

NUM_ENTRIES = 1200
BATCHES = 70


def test_a_reader_that_takes_its_time_gets_all_and_keeps_no_log_from_being_emptied(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    database = Database(path)
    names = [f"r{number:04}" for number in range(NUM_ENTRIES)]
    database.record([make_entry(name, ended_s=1000.0 + int(name[1:]) // 500) for name in names], [])
    listing = database.list_requests(since_s=1000.0, until_s=2000.0)
    listed = [next(listing).request_id]
    sizes = []
    for batch in range(BATCHES):
        database.record([make_entry(f"{batch}/{n}", ended_s=3000.0) for n in range(300)], [])
        sizes.append(path.with_name("ledger.db-wal").stat().st_size)
    assert sizes[-1] == sizes[-5], "it would grow for as long as the reader waits"
    assert listed + [entry.request_id for entry in listing] == names
    database.close()
