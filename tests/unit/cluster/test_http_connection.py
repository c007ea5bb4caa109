"""How a connection to the HTTP port ends where its caller does not read, on a transport that is made up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import uvicorn
from uvicorn.server import ServerState

from cluster.servers.http_connection import HttpConnection


class SlowTransport(asyncio.Transport):
    """Closed, with so many bytes left at each look."""

    def __init__(self, left_bytes: Sequence[int]) -> None:
        super().__init__()
        self._left_bytes = iter(left_bytes)
        self.is_cut = False

    def is_closing(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return next(self._left_bytes)

    def abort(self) -> None:
        self.is_cut = True


@pytest.mark.parametrize(("left_bytes", "is_cut"), [((9, 9), True), ((9, 5, 1), False)])
async def test_one_who_reads_nothing_more_is_cut_off(left_bytes: tuple[int, ...], is_cut: bool) -> None:
    config = uvicorn.Config(lambda *_: None, http=HttpConnection, ws="none", lifespan="off")
    config.load()
    connection = HttpConnection(config=config, server_state=ServerState(), app_state={})
    transport = SlowTransport(left_bytes)
    connection.connection_made(transport)
    for _ in left_bytes:
        connection._look()
    connection._stop_looking()
    assert transport.is_cut is is_cut
