"""An answer that outlives its router: the same question again, with the tokens that came, at the next one.

Called by `client.py`. The decision is `next_delay_s`, pure; a caller sees one stream without a seam.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Protocol, TypeAlias, cast

import grpc

from protos import wattline_inference_pb2 as pb

MAX_RESUMES = 7
FIRST_DELAY_S = 0.1
"""Doubled each time: 12.7 s in all, enough for a lone router to be started again."""

Request: TypeAlias = pb.GenerateRequest | pb.ChatRequest


class AnswerStream(Protocol):
    """What a streaming call of grpc gives: messages, and a way to give up."""

    def __iter__(self) -> Iterator[pb.GenerateResponse]: ...

    def cancel(self) -> bool: ...


class AnswerSoFar:
    """What came of an answer. Mutable; owned by its iteration."""

    def __init__(self) -> None:
        self.token = b""
        self._ids: list[int] = []
        self._is_ended = False

    @property
    def has_begun(self) -> bool:
        """A replica has it; where it died before the first token, only the token came."""
        return bool(self.token or self._ids) or self._is_ended

    def take(self, message: pb.GenerateResponse) -> bool:
        """Whether the message is news: after the last delta only the final message is."""
        if message.WhichOneof("event") != "delta":
            return True
        if self._is_ended:
            return False
        delta = message.delta
        self.token = delta.resume_token or self.token
        self._ids.extend(delta.token_ids)
        self._is_ended = delta.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        return True

    def ask_for_the_rest(self, request: Request) -> Request:
        """The request that goes on here; where only the final message is missing, the last token again."""
        if not self.has_begun:
            return request
        rest = deepcopy(request)
        rest.resume.token = self.token
        rest.resume.token_ids.extend(self._ids[:-1] if self._is_ended else self._ids)
        return rest


def next_delay_s(
    code: grpc.StatusCode, *, has_begun: bool, has_token: bool, attempt: int, num_routers: int
) -> float | None:
    """How long to wait before the next attempt; None: there is none. `attempt` counts those that failed."""
    if code is not grpc.StatusCode.UNAVAILABLE:
        return None
    if not has_begun:
        return 0.0 if attempt < num_routers else None
    if not has_token or attempt > MAX_RESUMES:
        return None
    return 0.0 if attempt < num_routers else FIRST_DELAY_S * 2.0 ** (attempt - 1)


def resumed(
    request: Request,
    start: Callable[[Request, int], AnswerStream],
    *,
    num_routers: int,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[pb.GenerateResponse]:
    """The messages of an answer. `start` opens a stream; its number says which router to ask.

    Raises the last RpcError where no router goes on.
    """
    so_far = AnswerSoFar()
    attempt = 0
    while True:
        try:
            for message in whole(start(so_far.ask_for_the_rest(request), attempt)):
                if so_far.take(message):
                    yield message
            return
        except grpc.RpcError as error:
            attempt += 1
            delay_s = next_delay_s(
                cast(grpc.Call, error).code(),
                has_begun=so_far.has_begun,
                has_token=bool(so_far.token),
                attempt=attempt,
                num_routers=num_routers,
            )
            if delay_s is None:
                raise
            sleep(delay_s)


def whole(stream: AnswerStream) -> Iterator[pb.GenerateResponse]:
    """The messages of one call, which is cancelled where its iteration is given up."""
    try:
        yield from stream
    finally:
        stream.cancel()


def countdown(timeout_s: float | None) -> Callable[[], float | None]:
    """What is left of a timeout that began now; None: there is none."""
    if timeout_s is None:
        return lambda: None
    end_s = time.monotonic() + timeout_s
    return lambda: max(0.001, end_s - time.monotonic())
