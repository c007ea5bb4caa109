"""The tables of a ledger file, and how a file of an older format gets them. Used by `Database` alone.

Format 2 added what the hosts drew beside the devices. An older file that is opened for writing is brought up
to date at once, whole or not at all; one that is only read is read through views that have the new columns.
"""

from __future__ import annotations

import sqlite3

VERSION = 2
_NO_TABLES = 0
_WITHOUT_HOSTS = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS requests (
  request_id TEXT PRIMARY KEY, trace_id TEXT,
  tenant TEXT NOT NULL, model TEXT NOT NULL, outcome TEXT NOT NULL,
  ended_s REAL NOT NULL, prompt_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER,
  wasted_tokens INTEGER, ttft_ms REAL, total_ms REAL,
  prefill_mj INTEGER, decode_mj INTEGER, static_mj INTEGER, wasted_mj INTEGER,
  source TEXT, method TEXT, confidence_factor REAL, is_final INTEGER, host_mj INTEGER
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS requests_by_time ON requests (ended_s);
CREATE TABLE IF NOT EXISTS hours (
  hour INTEGER NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, source TEXT NOT NULL,
  num_requests INTEGER, prompt_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER,
  wasted_tokens INTEGER, prefill_mj INTEGER, decode_mj INTEGER, static_mj INTEGER, wasted_mj INTEGER,
  num_final INTEGER, worst_confidence_factor REAL,
  host_mj INTEGER NOT NULL DEFAULT 0, num_host INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (hour, tenant, model, source)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replicas (
  replica_id TEXT NOT NULL, epoch INTEGER NOT NULL, source TEXT NOT NULL, minute INTEGER NOT NULL,
  model TEXT NOT NULL, at_s REAL NOT NULL,
  meter_mj INTEGER, request_mj INTEGER, idle_mj INTEGER, unattributed_mj INTEGER,
  host_meter_mj INTEGER NOT NULL DEFAULT 0, host_request_mj INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (replica_id, epoch, source, minute)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (
  tenant TEXT NOT NULL, day INTEGER NOT NULL, granted_mj INTEGER NOT NULL, PRIMARY KEY (tenant, day)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS horizon (
  one INTEGER PRIMARY KEY CHECK (one = 1), requests_from_s INTEGER NOT NULL
);
INSERT OR IGNORE INTO horizon VALUES (1, 0);
"""

_ADD_HOSTS = """
ALTER TABLE requests ADD COLUMN host_mj INTEGER;
ALTER TABLE hours ADD COLUMN host_mj INTEGER NOT NULL DEFAULT 0;
ALTER TABLE hours ADD COLUMN num_host INTEGER NOT NULL DEFAULT 0;
ALTER TABLE replicas ADD COLUMN host_meter_mj INTEGER NOT NULL DEFAULT 0;
ALTER TABLE replicas ADD COLUMN host_request_mj INTEGER NOT NULL DEFAULT 0;
"""

_SHOW_HOSTS = """
CREATE TEMP VIEW requests AS SELECT *, NULL AS host_mj FROM main.requests;
CREATE TEMP VIEW hours AS SELECT *, 0 AS host_mj, 0 AS num_host FROM main.hours;
CREATE TEMP VIEW replicas AS SELECT *, 0 AS host_meter_mj, 0 AS host_request_mj FROM main.replicas;
"""


def open_tables(connection: sqlite3.Connection, *, read_only: bool) -> int:
    """See to it that the tables are those of `VERSION`; returns the format that the file now passes for.

    Another one than `VERSION`: it is not ours to use. A new file opened for writing becomes a ledger.
    """
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if read_only and found == _WITHOUT_HOSTS:
        connection.executescript(_SHOW_HOSTS)
    elif not read_only and found in (_NO_TABLES, _WITHOUT_HOSTS):
        steps = _ADD_HOSTS if found == _WITHOUT_HOSTS else _TABLES
        connection.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {VERSION}; COMMIT;")
    else:
        return int(found)
    return VERSION
