"""The client's side of an answer that outlives its router."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grpc
import pytest

from cluster.resuming import FIRST_DELAY_S, MAX_RESUMES, Request, next_delay_s, resumed
from protos import wattline_inference_pb2 as pb

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
ASKED = pb.GenerateRequest(model="m", text="hello")
Script = Sequence[pb.GenerateResponse | grpc.StatusCode]


class Failure(grpc.RpcError):
    """What grpc raises; only its code is asked for."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


class ScriptedStream:
    def __init__(self, script: Script) -> None:
        self._script = script
        self.is_cancelled = False

    def __iter__(self) -> Iterator[pb.GenerateResponse]:
        for step in self._script:
            if isinstance(step, grpc.StatusCode):
                raise Failure(step)
            yield step

    def cancel(self) -> bool:
        self.is_cancelled = True
        return True


def delta(*token_ids: int, token: bytes = b"", is_last: bool = False) -> pb.GenerateResponse:
    finish = pb.FINISH_REASON_LENGTH if is_last else pb.FINISH_REASON_UNSPECIFIED
    return pb.GenerateResponse(delta=pb.Delta(token_ids=token_ids, resume_token=token, finish_reason=finish))


FINAL = pb.GenerateResponse(final=pb.Final(request_id="r"))


def run(scripts: Sequence[Script], *, num_routers: int) -> tuple[list[pb.GenerateResponse], list[Request]]:
    """What the caller gets of these streams, and what each was asked for."""
    asked: list[Request] = []

    def start(request: Request, attempt: int) -> ScriptedStream:
        assert attempt == len(asked)
        asked.append(request)
        return ScriptedStream(scripts[attempt])

    got = list(resumed(ASKED, start, num_routers=num_routers, sleep=lambda _: None))
    return got, asked


def test_a_lost_stream_goes_on_with_what_came() -> None:
    scripts: list[Script] = [
        [delta(1, 2, token=b"t"), delta(3), UNAVAILABLE],
        [UNAVAILABLE],
        [delta(4, token=b"u", is_last=True), FINAL],
    ]
    got, asked = run(scripts, num_routers=2)
    assert [list(message.delta.token_ids) for message in got] == [[1, 2], [3], [4], []]
    assert asked[0] == ASKED
    assert asked[1] == asked[2]
    assert (asked[1].resume.token, list(asked[1].resume.token_ids)) == (b"t", [1, 2, 3])


def test_the_newest_token_counts_also_where_no_other_came() -> None:
    scripts: list[Script] = [
        [delta(token=b"t"), UNAVAILABLE],
        [delta(1, token=b"u"), delta(2), delta(token=b"v"), UNAVAILABLE],
        [delta(3, token=b"w", is_last=True), FINAL],
    ]
    _, asked = run(scripts, num_routers=1)
    assert [(one.resume.token, list(one.resume.token_ids)) for one in asked] == [
        (b"", []),
        (b"t", []),
        (b"v", [1, 2]),
    ]


def test_an_answer_that_lacks_its_final_message_repeats_nothing() -> None:
    scripts: list[Script] = [
        [delta(1, 2, token=b"t"), delta(3, is_last=True), UNAVAILABLE],
        [delta(3, is_last=True), FINAL],
    ]
    got, asked = run(scripts, num_routers=1)
    assert [list(message.delta.token_ids) for message in got] == [[1, 2], [3], []]
    assert list(asked[1].resume.token_ids) == [1, 2]


@pytest.mark.parametrize(
    ("scripts", "num_routers"),
    [
        ([[UNAVAILABLE]], 1),
        ([[UNAVAILABLE], [UNAVAILABLE]], 2),
        ([[delta(1, token=b"t"), grpc.StatusCode.RESOURCE_EXHAUSTED]], 2),
        ([[delta(1), UNAVAILABLE]], 2),
        ([[delta(1, token=b"t"), UNAVAILABLE], [grpc.StatusCode.FAILED_PRECONDITION]], 2),
        ([[delta(1, token=b"t"), UNAVAILABLE], *[[UNAVAILABLE]] * MAX_RESUMES], 1),
    ],
    ids=["none", "none of two", "refused", "no token", "other weights", "spent"],
)
def test_what_cannot_go_on_fails_after_bounded_tries(scripts: list[Script], num_routers: int) -> None:
    with pytest.raises(Failure):
        run(scripts, num_routers=num_routers)


def test_waits_grow_and_end() -> None:
    delays = [
        next_delay_s(UNAVAILABLE, has_begun=True, has_token=True, attempt=attempt, num_routers=1)
        for attempt in range(1, MAX_RESUMES + 2)
    ]
    assert delays == [FIRST_DELAY_S * 2**index for index in range(MAX_RESUMES)] + [None]
    assert next_delay_s(UNAVAILABLE, has_begun=True, has_token=True, attempt=1, num_routers=2) == 0.0


def test_a_stream_that_is_left_is_cancelled() -> None:
    stream = ScriptedStream([delta(1), delta(2)])
    messages = resumed(ASKED, lambda _, __: stream, num_routers=1)
    next(messages)
    del messages
    assert stream.is_cancelled
