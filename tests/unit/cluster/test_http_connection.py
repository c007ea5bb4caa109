"""How a connection to the HTTP port ends where its caller does not read, on a transport that is made up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from cluster.servers.http_connection import HttpConnection


class SlowTransport(asyncio.Transport):
    """With so many bytes left at each look."""

    def __init__(self, left_bytes: Sequence[int], *, is_closed: bool) -> None:
        super().__init__()
        self._left_bytes = iter(left_bytes)
        self._is_closed = is_closed
        self.is_cut = False

    def is_closing(self) -> bool:
        return self._is_closed

    def get_write_buffer_size(self) -> int:
        return next(self._left_bytes)

    def abort(self) -> None:
        self.is_cut = True


def connected(transport: SlowTransport) -> HttpConnection:
    config = uvicorn.Config(lambda *_: None, http=HttpConnection, ws="none", lifespan="off")
    config.load()
    connection = HttpConnection(config=config, server_state=ServerState(), app_state={})
    connection.connection_made(transport)
    return connection


@pytest.mark.parametrize(("left_bytes", "is_cut"), [((9, 9), True), ((9, 5, 1), False)])
async def test_one_who_reads_nothing_more_is_cut_off(left_bytes: tuple[int, ...], is_cut: bool) -> None:
    transport = SlowTransport(left_bytes, is_closed=True)
    connection = connected(transport)
    for _ in left_bytes:
        connection._look()
    connection._stop_looking()
    assert transport.is_cut is is_cut


@pytest.mark.parametrize(
    ("unsent_bytes", "is_cut"), [((9, 9), True), ((9, 7), False), ((0, 0), False)], ids=str
)
async def test_a_document_that_nobody_reads_is_cut_off_and_a_stream_of_events_goes_on(
    unsent_bytes: tuple[int, ...], is_cut: bool
) -> None:
    """Nothing of events is counted beforehand: what they have in the end is known of none of them."""
    transport = SlowTransport((5, 5), is_closed=False)
    connection = connected(transport)
    for count in unsent_bytes:
        connection.cycle = cast(
            RequestResponseCycle, SimpleNamespace(response_complete=False, expected_content_length=count)
        )
        connection._look()
    connection._stop_looking()
    assert transport.is_cut is is_cut
