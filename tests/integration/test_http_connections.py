"""What a connection to the HTTP port may bring before anybody knows who calls, over plain sockets."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.openai import exchange
from cluster.servers import http_connection
from cluster.servers.http_connection import MAX_HEAD_BYTES
from tests.router_fixture import make_config, run_test_router

WAIT_S = 60.0
BEGINNING = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
ASKING = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


async def say(address: str, content: bytes) -> bytes:
    """All that comes back until the router ends the connection, which may be before it read all of this."""
    host, _, port = address.rpartition(":")
    answer = b""
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        with suppress(ConnectionError):
            writer.write(content)
            answer = await reader.read()
        writer.close()
    return answer


@pytest.mark.parametrize("filler", [b"a", b"a: b\r\n"], ids=["one-header", "many-headers"])
async def test_a_head_without_end_is_refused(filler: bytes) -> None:
    endless = BEGINNING + filler * (MAX_HEAD_BYTES // len(filler))
    async with run_test_router() as router:
        answer = await say(router.addresses.http, endless)
        usual = await say(router.addresses.http, BEGINNING + b"connection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert usual.startswith(b"HTTP/1.1 200 ")


async def test_a_head_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEAD_S", 0.05)
    async with run_test_router() as router:
        assert await say(router.addresses.http, BEGINNING) == b""


async def test_a_wish_for_a_websocket_is_not_heard() -> None:
    wish = b"connection: close, upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    async with run_test_router() as router:
        answer = await say(
            router.addresses.http, BEGINNING + wish + b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"alive\n")


@pytest.mark.parametrize("is_announced", [True, False])
async def test_a_body_over_the_limit_is_refused(is_announced: bool) -> None:
    body = b" " * 5000
    if is_announced:
        rest = b"content-length: %d\r\n\r\n%s" % (len(body), body)
    else:
        rest = b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    async with run_test_router(make_config(router={"max_body_bytes": 4096})) as router:
        answer = await say(router.addresses.http, ASKING + b"connection: close\r\n" + rest)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"4096 bytes" in answer


async def test_a_body_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_S", 0.05)
    async with run_test_router() as router:
        answer = await say(router.addresses.http, ASKING + b"connection: close\r\ncontent-length: 9\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body: 1 bytes came in" in answer and b"allowed: 0.05 s, 1 s more for each 4096 bytes" in answer


async def test_a_body_that_trickles_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_S", 1.0)
    async with run_test_router() as router:
        host, _, port = router.addresses.http.rpartition(":")
        async with asyncio.timeout(WAIT_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(ASKING + b"content-length: 1000000\r\n\r\n")
            answer = asyncio.create_task(reader.readline())
            while not answer.done():
                writer.write(b" ")
                await asyncio.wait((answer,), timeout=0.01)
            writer.close()
    assert answer.result().startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(("has_keys", "status"), [(True, 401), (False, 413)])
async def test_a_refusal_is_heard_behind_a_large_body(
    has_keys: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the sockets between the two hold, so that the caller is still sending when it is refused."""
    monkeypatch.setattr(http_connection, "HEAD_S", WAIT_S)
    (tmp_path / "keys").touch()
    limits = {"auth": {"keys_file": str(tmp_path / "keys")}} if has_keys else {}
    body = bytes(2**25)
    async with run_test_router(
        make_config(router={"max_body_bytes": 2**26 if has_keys else 4096, **limits})
    ) as router:
        host, _, port = router.addresses.http.rpartition(":")
        async with asyncio.timeout(WAIT_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(ASKING + b"content-length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()
            assert (await reader.readline()).startswith(b"HTTP/1.1 %d " % status)
            writer.close()
