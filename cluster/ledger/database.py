"""The SQLite file of the ledger store. With its `schema.py`, the only SQL there is.

Write-ahead log: a commit survives `kill -9` of the process, and readers never wait. Requests are kept one by
one for `request_days`, hours of them for `sums_days`. What is known already is not counted again, so a batch
may be sent twice. One thread uses a `Database`; another process may open the file beside it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from cluster.ledger.entries import BilledEnergy, ModelSums, ReplicaSums, RequestEntry, RequestSums, Summary
from cluster.ledger.schema import VERSION, open_tables

HOUR_S = 3600
DAY_S = 86_400
BUSY_TIMEOUT_S = 5.0

_SUMS = """
  count(*), sum(prompt_tokens), sum(cached_tokens), sum(output_tokens), sum(wasted_tokens),
  coalesce(sum(prefill_mj), 0), coalesce(sum(decode_mj), 0), coalesce(sum(static_mj), 0),
  coalesce(sum(wasted_mj), 0), coalesce(sum(is_final), 0), coalesce(sum(host_mj), 0), count(host_mj),
  coalesce(max(confidence_factor), 0.0)
"""
_REQUEST_SUMS = tuple(field.name for field in fields(RequestSums))
_SUM_NAMES = _REQUEST_SUMS[3:]
_DIVIDED = tuple(field.name for field in fields(ModelSums))[2:]


def _insert_into(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


_ADD_TO_HOUR = (
    f"{_insert_into('hours', ('hour', *_REQUEST_SUMS))} ON CONFLICT DO UPDATE SET "
    f"{', '.join(f'{name} = {name} + excluded.{name}' for name in _SUM_NAMES[:-1])}, "
    "worst_confidence_factor = max(worst_confidence_factor, excluded.worst_confidence_factor)"
)
_REPLICA_COLUMNS = ("replica_id", "epoch", "source", "minute", "model", "at_s", *_DIVIDED)
_SET_REPLICA = (
    f"{_insert_into('replicas', _REPLICA_COLUMNS)} ON CONFLICT DO UPDATE SET at_s = excluded.at_s, "
    f"{', '.join(f'{name} = excluded.{name}' for name in _DIVIDED)} WHERE excluded.meter_mj >= meter_mj"
)
_PAGE_OF_REQUESTS = (
    "SELECT * FROM requests WHERE (ended_s, request_id) > (?, ?) AND ended_s < ? "
    "ORDER BY ended_s, request_id LIMIT 512"
)


class LedgerFileError(OSError):
    """The file is no ledger that this version can use; the text is for the operator."""


class Database:
    """Owns one open ledger file. Raises LedgerFileError for a file that is not one."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        try:
            self._connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
            if not read_only:
                self._connection.execute("PRAGMA journal_mode = WAL")
            found = open_tables(self._connection, read_only=read_only)
        except sqlite3.Error as error:
            raise LedgerFileError(
                f"{path}: cannot be used as a ledger ({error}); give another file, or move it away"
            ) from error
        if found != VERSION:
            raise LedgerFileError(
                f"{path}: is a ledger of format {found}, not {VERSION}; use the version that wrote it"
            )

    def close(self) -> None:
        self._connection.close()

    def record(self, requests: Sequence[RequestEntry], replicas: Sequence[ReplicaSums]) -> int:
        """Commit a batch; returns how many requests were new."""
        with self._connection as transaction:
            new = [entry for entry in requests if self._insert(transaction, entry)]
            for entry in new:
                hour = int(entry.ended_s) // HOUR_S
                transaction.execute(_ADD_TO_HOUR, (hour, *astuple(_sums_of(entry))))
            for sums in replicas:
                transaction.execute(_SET_REPLICA, _replica_row(sums))
        return len(new)

    def summarize(self, *, since_s: float, until_s: float) -> Summary:
        """Sums of requests that ended in [since, until), by tenant, model and source; and of the meters.

        Before the requests that are still kept one by one, time is counted in whole hours.
        """
        kept_from_s = self._kept_from_s()
        rows = self._connection.execute(
            f"SELECT tenant, model, source, {', '.join(_sql_sum(name) for name in _SUM_NAMES)} FROM ("
            f"SELECT tenant, model, source, {', '.join(_SUM_NAMES)} FROM hours WHERE hour >= ? AND hour < ? "
            f"UNION ALL SELECT tenant, model, coalesce(source, ''), {_SUMS} FROM requests "
            "WHERE ended_s >= ? AND ended_s < ? GROUP BY tenant, model, coalesce(source, '')"
            ") GROUP BY tenant, model, source ORDER BY tenant, model, source",
            (
                int(since_s) // HOUR_S,
                int(min(until_s, kept_from_s)) // HOUR_S,
                max(since_s, kept_from_s),
                until_s,
            ),
        )
        return Summary(
            requests=tuple(RequestSums(**dict(zip(_REQUEST_SUMS, row, strict=True))) for row in rows),
            models=self._sum_models(since_s, until_s),
        )

    def list_requests(self, *, since_s: float, until_s: float) -> Iterator[RequestEntry]:
        """Requests that ended in [since, until) and are still kept one by one, oldest first.

        By pages: a query that stays open while its reader takes its time keeps the log from being emptied.
        """
        after = (since_s, "")
        while rows := self._connection.execute(_PAGE_OF_REQUESTS, (*after, until_s)).fetchall():
            entries = [_entry_of(row) for row in rows]
            yield from entries
            after = (entries[-1].ended_s, entries[-1].request_id)

    def prune(self, *, now_s: float, request_days: float, sums_days: float, max_requests: int) -> int:
        """Drop what is too old or too much, by whole hours; returns how many requests went.

        The present hour and the one before stay: requests of them are still to come, which could not be told
        from those that went. So does what comes after a clock that was ahead was set right.
        """
        from_s = int(now_s - request_days * DAY_S) // HOUR_S * HOUR_S
        beyond = self._connection.execute(
            "SELECT ended_s FROM requests ORDER BY ended_s DESC LIMIT 1 OFFSET ?", (max_requests,)
        ).fetchone()
        if beyond is not None:
            from_s = max(from_s, (int(beyond[0]) // HOUR_S + 1) * HOUR_S)
        from_s = min(max(from_s, self._kept_from_s()), (int(now_s) // HOUR_S - 1) * HOUR_S)
        sums_from_s = now_s - sums_days * DAY_S
        with self._connection as transaction:
            gone = transaction.execute("DELETE FROM requests WHERE ended_s < ?", (from_s,)).rowcount
            transaction.execute("UPDATE horizon SET requests_from_s = ?", (from_s,))
            transaction.execute("DELETE FROM hours WHERE hour < ?", (int(sums_from_s) // HOUR_S,))
            transaction.execute("DELETE FROM replicas WHERE at_s < ?", (sums_from_s,))
            # One row an hour is enough of what is older: the last of each.
            transaction.execute(
                "DELETE FROM replicas WHERE at_s < ? AND EXISTS (SELECT 1 FROM replicas AS later "
                "WHERE later.replica_id = replicas.replica_id AND later.epoch = replicas.epoch "
                "AND later.source = replicas.source AND later.minute > replicas.minute "
                "AND later.minute / 60 = replicas.minute / 60)",
                (from_s,),
            )
            transaction.execute("DELETE FROM leases WHERE day < ?", (int(now_s) // DAY_S - 1,))
        return gone

    def lease(self, tenant: str, *, want_mj: int, budget_mj: int, day: int) -> int:
        """Grant up to `want_mj` of what the day's budget has left."""
        with self._connection as transaction:
            row = transaction.execute(
                "SELECT granted_mj FROM leases WHERE tenant = ? AND day = ?", (tenant, day)
            ).fetchone()
            granted_mj = max(0, min(want_mj, budget_mj - (row[0] if row else 0)))
            if granted_mj:
                self._add_grant(transaction, tenant, day, granted_mj)
        return granted_mj

    def give_back(self, tenant: str, *, unspent_mj: int, day: int) -> None:
        """Part of a grant was not spent. More than was granted is not taken."""
        with self._connection as transaction:
            transaction.execute(
                "UPDATE leases SET granted_mj = max(0, granted_mj - ?) WHERE tenant = ? AND day = ?",
                (unspent_mj, tenant, day),
            )

    def _add_grant(self, transaction: sqlite3.Connection, tenant: str, day: int, granted_mj: int) -> None:
        transaction.execute(
            "INSERT INTO leases VALUES (?, ?, ?) "
            "ON CONFLICT DO UPDATE SET granted_mj = granted_mj + excluded.granted_mj",
            (tenant, day, granted_mj),
        )

    def _insert(self, transaction: sqlite3.Connection, entry: RequestEntry) -> bool:
        if entry.ended_s < self._kept_from_s():
            return False  # Counted long ago, or nobody can say any more.
        row = _row_of(entry)
        done = transaction.execute(
            f"INSERT OR IGNORE INTO requests VALUES ({', '.join('?' * len(row))})", row
        )
        return done.rowcount == 1

    def _kept_from_s(self) -> int:
        (from_s,) = self._connection.execute("SELECT requests_from_s FROM horizon").fetchone()
        return int(from_s)

    def _sum_models(self, since_s: float, until_s: float) -> tuple[ModelSums, ...]:
        """What was added within the span: running sums at its end, less those at its beginning."""
        added = ", ".join(
            f"max(CASE WHEN at_s < :until THEN {name} END) "
            f"- coalesce(max(CASE WHEN at_s < :since THEN {name} END), 0) AS {name}"
            for name in _DIVIDED
        )
        rows = self._connection.execute(
            f"SELECT model, source, {', '.join(f'sum({name})' for name in _DIVIDED)} FROM ("
            f"SELECT model, source, {added} FROM replicas WHERE at_s < :until "
            "GROUP BY replica_id, epoch, source, model HAVING max(at_s) >= :since"
            ") GROUP BY model, source ORDER BY model, source",
            {"since": since_s, "until": until_s},
        )
        return tuple(ModelSums(**dict(zip(("model", "source", *_DIVIDED), row, strict=True))) for row in rows)


def _sql_sum(name: str) -> str:
    return f"max({name})" if name == "worst_confidence_factor" else f"sum({name})"


def _sums_of(entry: RequestEntry) -> RequestSums:
    """One request as a sum."""
    energy = entry.energy
    return RequestSums(
        tenant=entry.tenant,
        model=entry.model,
        source=energy.source if energy else "",
        num_requests=1,
        prompt_tokens=entry.prompt_tokens,
        cached_tokens=entry.cached_tokens,
        output_tokens=entry.output_tokens,
        wasted_tokens=entry.wasted_tokens,
        prefill_mj=energy.prefill_mj if energy else 0,
        decode_mj=energy.decode_mj if energy else 0,
        static_mj=energy.static_mj if energy else 0,
        wasted_mj=energy.wasted_mj if energy else 0,
        num_final=int(energy.is_final) if energy else 0,
        host_mj=(energy.host_mj or 0) if energy else 0,
        num_host=int(energy is not None and energy.host_mj is not None),
        worst_confidence_factor=energy.confidence_factor if energy else 0.0,
    )


_NUM_REQUEST_COLUMNS = 12


def _row_of(entry: RequestEntry) -> tuple[object, ...]:
    known = tuple(getattr(entry, field.name) for field in fields(RequestEntry)[:_NUM_REQUEST_COLUMNS])
    energy = astuple(entry.energy) if entry.energy else (None,) * len(fields(BilledEnergy))
    return (*known, *energy)


def _entry_of(row: tuple[object, ...]) -> RequestEntry:
    names = [field.name for field in fields(RequestEntry)[:_NUM_REQUEST_COLUMNS]]
    known = dict(zip(names, row[:_NUM_REQUEST_COLUMNS], strict=True))
    billed = dict(
        zip((field.name for field in fields(BilledEnergy)), row[_NUM_REQUEST_COLUMNS:], strict=True)
    )
    billed["is_final"] = bool(billed["is_final"])
    energy = None if billed["source"] is None else BilledEnergy(**billed)  # type: ignore[arg-type]
    return RequestEntry(**known, energy=energy)  # type: ignore[arg-type]


def _replica_row(sums: ReplicaSums) -> tuple[object, ...]:
    return (
        sums.replica_id,
        sums.epoch,
        sums.source,
        int(sums.at_s) // 60,
        sums.model,
        sums.at_s,
        *(getattr(sums, name) for name in _DIVIDED),
    )
