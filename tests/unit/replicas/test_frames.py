"""Commands and events cross the socket whole, in order, and bounded."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from replicas.errors import RankLost
from replicas.expert_loads import ExpertLoads
from replicas.frames import (
    HEADER,
    MAX_FRAME_BYTES,
    Cancel,
    Command,
    EngineFailure,
    Event,
    LoadingProgress,
    RankSocket,
    Shutdown,
    Stop,
    Submit,
    decode_command,
    decode_event,
    encode_command,
    encode_event,
    read_event,
    write_command,
)
from replicas.request import (
    EngineCosts,
    EngineReady,
    FinishReason,
    GenerationRequest,
    LoadSnapshot,
    SamplingParams,
    SequenceDelta,
    SequenceTiming,
    StepMember,
    StepRecord,
    StepRows,
    TokenLogprobs,
)
from replicas.step_report import StepReport, TokenColumns
from replicas.step_trail import StepTrail, TokenGap

REQUEST = GenerationRequest(
    request_id=2**60,
    prompt_ids=(1, 2, 128_000),
    max_tokens=5,
    sampling=SamplingParams(
        temperature=0.5,
        top_p=0.75,
        top_k=40,
        seed=2**64 - 1,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=2.0,
        logit_bias=((3, -100.0), (7, 0.5)),
        num_logprobs=0,
    ),
    stop_token_ids=frozenset({2, 7}),
    priority=-3,
    deadline_ns=1_500_000_000,
    lane=1,
    attempt=2,
    first_offset=1,
    cache_salt=bytes(range(16)),
    traceparent=f"00-{'a' * 32}-{'b' * 16}-01",
)
LOAD = LoadSnapshot(
    step=4,
    running=(1, 2),
    waiting=(0, 3),
    waiting_prefill_tokens=(10, 20),
    free_blocks=(5, 6),
    total_blocks=(7, 8),
    step_ms=1.5,
    prefill_tokens_per_s=2.5,
    decode_tokens_per_s=3.5,
    prompt_tokens_total=9,
    cached_tokens_total=4,
    generated_tokens_total=10,
)
TRAIL = StepTrail(
    first_step=2**40,
    first_token_step=2**40 + 1,
    last_step=2**40 + 9,
    num_prefill_steps=2,
    num_decode_steps=7,
    longest_gap=TokenGap(duration_us=5, end_us=6, step=2**40 + 4),
)
REPORT = StepReport(
    step=4,
    tokens=TokenColumns(
        request_ids=[3, 4], attempts=[0, 1], first_offsets=[5, 0], counts=[1, 2], token_ids=[9, 8, 7]
    ),
    deltas=(
        SequenceDelta(
            request_id=1,
            attempt=0,
            first_offset=3,
            token_ids=(7, 0),
            logprobs=(TokenLogprobs(logprob=-0.5, top=((9, -0.25), (7, -0.5))), TokenLogprobs(logprob=-2.0)),
        ),
        SequenceDelta(
            request_id=2,
            attempt=1,
            first_offset=0,
            token_ids=(),
            finish=FinishReason.ERROR,
            timing=SequenceTiming(
                queue_us=1,
                prefill_us=2,
                decode_us=3,
                cached_tokens=4,
                wasted_tokens=5,
                preemptions=6,
                trail=TRAIL,
            ),
            error=("INTERNAL", "not finite"),
        ),
    ),
    load=LOAD,
    record=StepRecord(
        step=4,
        start_ns=100,
        end_ns=200,
        rows=StepRows.of(
            [
                StepMember(request_id=1, new_tokens=2, context_tokens=3, is_prefill=True, wasted_tokens=1),
                StepMember(request_id=2, new_tokens=1, context_tokens=9, is_prefill=False),
            ]
        ),
        experts_hit=12,
    ),
)
READY = EngineReady(
    architecture="llama",
    lanes=2,
    context_tokens=4096,
    max_sequences=64,
    vocab_size=128_256,
    block_tokens=16,
    weights_digest="abc",
    dtype="float32",
    device="cpu",
    kernels="avx512-int8",
    quantization="int8",
    eos_token_ids=(1, 2),
    costs=EngineCosts(
        active_params=1,
        shared_weight_bytes=2,
        expert_bytes=3,
        num_layers=4,
        attention_dim=5,
        kv_bytes_per_token=6,
    ),
    load=LOAD,
)
COMMANDS = (Submit(request=REQUEST), Cancel(request_id=2**60), Stop(request_id=3), Shutdown())
EVENTS = (
    LoadingProgress(rank=1, stage="weights", done=3, total=2**40),
    READY,
    REPORT,
    replace(REPORT, record=None, deltas=()),
    EngineFailure(reason="RankLost: rank 1 failed"),
    ExpertLoads(num_experts=2, tokens=(3, 2**40, 0, 7), num_ranks=2, spares=(-1, 0, 1, -1)),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_survives_the_round_trip(command: Command) -> None:
    assert decode_command(encode_command(command, now_ns=0), now_ns=0) == command


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_survives_the_round_trip(event: Event) -> None:
    assert decode_event(encode_event(event)) == event


@pytest.mark.parametrize(
    "trail", [None, replace(TRAIL, longest_gap=None), replace(TRAIL, first_token_step=None, longest_gap=None)]
)
def test_what_a_trail_does_not_have_is_absent_behind_the_wire_too(trail: StepTrail | None) -> None:
    timing = REPORT.deltas[1].timing
    assert timing is not None
    report = replace(REPORT, deltas=(replace(REPORT.deltas[1], timing=replace(timing, trail=trail)),))
    assert decode_event(encode_event(report)) == report


@pytest.mark.parametrize("finish", list(FinishReason))
def test_every_finish_reason_survives_the_round_trip(finish: FinishReason) -> None:
    delta = replace(REPORT.deltas[1], finish=finish)
    assert decode_event(encode_event(replace(REPORT, deltas=(delta,)))) == replace(REPORT, deltas=(delta,))


@pytest.mark.parametrize(
    ("left_ns", "expected_ns"), [(None, None), (-5, 1_000_000), (1, 1_000_000), (2_500_000, 3_000_000)]
)
def test_a_deadline_travels_as_the_time_left(left_ns: int | None, expected_ns: int | None) -> None:
    """Whole milliseconds, rounded up; what has passed still is a deadline."""
    sent = replace(REQUEST, deadline_ns=None if left_ns is None else 1_000_000_000 + left_ns)
    received = decode_command(encode_command(Submit(request=sent), now_ns=1_000_000_000), now_ns=7)
    assert isinstance(received, Submit)
    assert received.request.deadline_ns == (None if expected_ns is None else 7 + expected_ns)


def test_a_frame_that_says_nothing_is_refused() -> None:
    with pytest.raises(RankLost, match="no command known"):
        decode_command(b"", now_ns=0)
    with pytest.raises(RankLost, match="no event known"):
        decode_event(b"")


@pytest.fixture
def sockets() -> Iterator[tuple[RankSocket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with RankSocket(ours, clock=lambda: 0) as rank, theirs:
        yield rank, theirs


def frame(payload: bytes) -> bytes:
    return HEADER.pack(len(payload)) + payload


def test_the_rank_reads_frames_whatever_the_pieces(sockets: tuple[RankSocket, socket.socket]) -> None:
    rank, peer = sockets
    stream = b"".join(frame(encode_command(command, now_ns=0)) for command in COMMANDS)
    received: list[Command] = []
    for index in range(len(stream)):
        peer.sendall(stream[index : index + 1])
        received += rank.receive(wait=False)
    assert tuple(received) == COMMANDS


def test_the_rank_sleeps_until_a_command_is_whole(sockets: tuple[RankSocket, socket.socket]) -> None:
    rank, peer = sockets
    stream = frame(encode_command(Cancel(request_id=9), now_ns=0))
    peer.sendall(stream[:5])
    assert rank.receive(wait=False) == []
    sender = threading.Thread(target=peer.sendall, args=(stream[5:],))
    sender.start()
    assert rank.receive(wait=True) == [Cancel(request_id=9)]
    sender.join()


def test_the_rank_notices_that_the_supervisor_is_gone(sockets: tuple[RankSocket, socket.socket]) -> None:
    rank, peer = sockets
    peer.close()
    with pytest.raises(RankLost, match="closed the socket"):
        rank.receive(wait=True)
    with pytest.raises(RankLost, match="does not read"):
        rank.send(EngineFailure(reason="too late"))


def test_a_frame_over_the_limit_is_refused(sockets: tuple[RankSocket, socket.socket]) -> None:
    rank, peer = sockets
    with pytest.raises(RankLost, match="longer than the limit"):
        rank.send(EngineFailure(reason="x" * (MAX_FRAME_BYTES + 1)))
    peer.sendall(HEADER.pack(MAX_FRAME_BYTES + 1))
    with pytest.raises(RankLost, match="longer than the limit"):
        rank.receive(wait=True)


def test_dialling_a_supervisor_that_never_listens_ends(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match="no supervisor listens"):
        RankSocket.connect(str(tmp_path / "none.sock"), timeout_s=0.0)


@asynccontextmanager
async def connect_supervisor(
    peer: socket.socket,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_unix_connection(sock=peer)
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_the_supervisor_talks_to_the_rank(sockets: tuple[RankSocket, socket.socket]) -> None:
    rank, peer = sockets
    async with connect_supervisor(peer.dup()) as (reader, writer):
        for event in EVENTS:
            rank.send(event)
        assert [await read_event(reader) for _ in EVENTS] == list(EVENTS)
        for command in COMMANDS:
            await write_command(writer, command, clock=lambda: 0)
        assert rank.receive(wait=True) == list(COMMANDS)
        rank.close()
        peer.close()
        with pytest.raises(RankLost, match="closed its socket"):
            await read_event(reader)


async def test_the_supervisor_refuses_a_frame_over_the_limit() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(HEADER.pack(MAX_FRAME_BYTES + 1))
    with pytest.raises(RankLost, match="longer than the limit"):
        await read_event(reader)


async def test_a_frame_cut_short_is_a_lost_rank() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(HEADER.pack(10) + b"half")
    reader.feed_eof()
    with pytest.raises(RankLost, match="closed its socket"):
        await read_event(reader)
