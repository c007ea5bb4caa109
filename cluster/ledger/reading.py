"""Where reports read from: a running store, or the file of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import grpc

from cluster.command_error import CommandError
from cluster.ledger.database import Database, LedgerFileError
from cluster.ledger.entries import RequestEntry, Summary
from cluster.ledger.wire import request_from_wire, summary_from_wire
from protos import wattline_ledger_pb2 as pb
from protos import wattline_ledger_pb2_grpc as pb_grpc

TIMEOUT_S = 30.0


class LedgerReader(Protocol):
    """Spans are [since, until), in seconds since 1970."""

    def summarize(self, *, since_s: float, until_s: float) -> Summary: ...

    def list_requests(self, *, since_s: float, until_s: float) -> Iterator[RequestEntry]: ...

    def close(self) -> None: ...


class StoreReader:
    """Asks a running store. Raises CommandError where it does not answer."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address)
        self._store = pb_grpc.LedgerStoreStub(self._channel)

    def summarize(self, *, since_s: float, until_s: float) -> Summary:
        request = pb.SummarizeRequest(since_s=since_s, until_s=until_s)
        try:
            return summary_from_wire(self._store.Summarize(request, timeout=TIMEOUT_S))
        except grpc.RpcError as error:
            raise self._explain(error) from error

    def list_requests(self, *, since_s: float, until_s: float) -> Iterator[RequestEntry]:
        request = pb.ListRequestsRequest(since_s=since_s, until_s=until_s)
        try:
            for batch in self._store.ListRequests(request):
                yield from map(request_from_wire, batch.requests)
        except grpc.RpcError as error:
            raise self._explain(error) from error

    def close(self) -> None:
        self._channel.close()

    def _explain(self, error: grpc.RpcError) -> CommandError:
        code = error.code().name if isinstance(error, grpc.Call) else "UNKNOWN"
        return CommandError(
            f"no answer from the ledger store at {self._address} ({code}); is it running? or give --db FILE"
        )


def open_reader(*, address: str, path: Path) -> LedgerReader:
    """The store at `address`, or without one the file. Raises CommandError."""
    if address:
        return StoreReader(address)
    if not path.is_file():
        raise CommandError(
            f"{path}: no ledger there; `wattline up` keeps one, or give --db FILE or --address"
        )
    try:
        return Database(path, read_only=True)
    except LedgerFileError as error:
        raise CommandError(str(error)) from error
