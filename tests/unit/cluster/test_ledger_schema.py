"""Ledger files of other versions: older ones are read and brought up to date, newer ones are let be."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.ledger.database import Database, LedgerFileError
from cluster.ledger.entries import ModelSums
from tests.ledger_entries import ENERGY, make_entry, make_replica_sums

FORMAT_1 = """
CREATE TABLE requests (
  request_id TEXT PRIMARY KEY, trace_id TEXT,
  tenant TEXT NOT NULL, model TEXT NOT NULL, outcome TEXT NOT NULL,
  ended_s REAL NOT NULL, prompt_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER,
  wasted_tokens INTEGER, ttft_ms REAL, total_ms REAL,
  prefill_mj INTEGER, decode_mj INTEGER, static_mj INTEGER, wasted_mj INTEGER,
  source TEXT, method TEXT, confidence_factor REAL, is_final INTEGER
) WITHOUT ROWID;
CREATE TABLE hours (
  hour INTEGER NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, source TEXT NOT NULL,
  num_requests INTEGER, prompt_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER,
  wasted_tokens INTEGER, prefill_mj INTEGER, decode_mj INTEGER, static_mj INTEGER, wasted_mj INTEGER,
  num_final INTEGER, worst_confidence_factor REAL,
  PRIMARY KEY (hour, tenant, model, source)
) WITHOUT ROWID;
CREATE TABLE replicas (
  replica_id TEXT NOT NULL, epoch INTEGER NOT NULL, source TEXT NOT NULL, minute INTEGER NOT NULL,
  model TEXT NOT NULL, at_s REAL NOT NULL,
  meter_mj INTEGER, request_mj INTEGER, idle_mj INTEGER, unattributed_mj INTEGER,
  PRIMARY KEY (replica_id, epoch, source, minute)
) WITHOUT ROWID;
CREATE TABLE leases (
  tenant TEXT NOT NULL, day INTEGER NOT NULL, granted_mj INTEGER NOT NULL, PRIMARY KEY (tenant, day)
) WITHOUT ROWID;
CREATE TABLE horizon (
  one INTEGER PRIMARY KEY CHECK (one = 1), requests_from_s INTEGER NOT NULL
);
INSERT INTO horizon VALUES (1, 7200);
INSERT INTO hours VALUES (1, 'a', 'm', 'counter', 3, 30, 0, 60, 0, 100, 200, 50, 0, 3, 1.05);
INSERT INTO hours VALUES (2, 'a', 'm', 'counter', 1, 10, 0, 20, 0, 1000, 3000, 500, 0, 1, 1.05);
INSERT INTO requests VALUES (
  'old', 't', 'a', 'm', 'stop', 7300.0, 10, 0, 20, 0, 1.0, 2.0,
  1000, 3000, 500, 0, 'counter', 'step', 1.05, 1
);
INSERT INTO replicas VALUES ('r', 1, 'counter', 121, 'm', 7300.0, 5000, 4000, 900, 100);
PRAGMA user_version = 1;
"""


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(FORMAT_1)
    connection.close()
    return path


def version_of(path: Path) -> int:
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return int(version)


OLD = ModelSums(model="m", source="counter", meter_mj=5000, request_mj=4000, idle_mj=900, unattributed_mj=100)


def test_an_old_file_is_read_as_it_is(old_file: Path) -> None:
    database = Database(old_file, read_only=True)
    summary = database.summarize(since_s=0.0, until_s=1e6)
    (sums,) = summary.requests
    assert (sums.num_requests, sums.energy_mj, sums.host_mj, sums.num_host) == (4, 4300, 0, 0)
    assert summary.models == (OLD,)
    (entry,) = database.list_requests(since_s=0.0, until_s=1e6)
    assert entry.energy is not None
    assert (entry.request_id, entry.energy.host_mj) == ("old", None)
    database.close()
    assert version_of(old_file) == 1


def test_an_old_file_goes_on_with_what_it_lacked(old_file: Path) -> None:
    for _ in range(2):  # The second time it is of the new format.
        database = Database(old_file)
        new = make_replica_sums(replica_id="r", epoch=2, at_s=7400.0, host_meter_mj=700, host_request_mj=600)
        known, unknown = (
            make_entry(name, tenant="a", ended_s=7400.0, energy=replace(ENERGY, host_mj=host_mj))
            for name, host_mj in (("known", 700), ("unknown", None))
        )
        database.record([known, unknown], [new])
        summary = database.summarize(since_s=0.0, until_s=1e6)
        listed = list(database.list_requests(since_s=0.0, until_s=1e6))
        database.close()
    (sums,) = summary.requests
    assert (sums.num_requests, sums.energy_mj, sums.host_mj, sums.num_host) == (6, 12_300, 700, 1)
    hosts_mj = {entry.request_id: entry.energy.host_mj for entry in listed if entry.energy}
    assert hosts_mj == {"old": None, "known": 700, "unknown": None}
    (models,) = summary.models
    assert (models.meter_mj, models.host_meter_mj, models.host_rest_mj) == (10_000, 700, 100)
    assert version_of(old_file) == 2


@pytest.mark.parametrize("read_only", [True, False])
def test_a_newer_file_is_refused_and_left_as_it_is(old_file: Path, read_only: bool) -> None:
    connection = sqlite3.connect(old_file)
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(LedgerFileError, match="a ledger of format 3, not 2; use the version that wrote it"):
        Database(old_file, read_only=read_only)
    assert version_of(old_file) == 3
