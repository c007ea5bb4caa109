"""What waits for a reader: joined without loss, and within its bytes, which are counted as they are."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from cluster.link import token_stream
from cluster.link.reader_pace import MAX_GAP_S, MAX_MESSAGES_A_TURN, MAX_MESSAGES_PER_S, ReaderPace
from cluster.link.token_stream import Finished, TokenStream
from cluster.text.answer_text import AnswerText, Piece
from cluster.text.null_tokenizer import NullTokenizer
from replicas.request import FinishReason, TokenLogprobs

MIB = 2**20


class Overflow:
    """Counts how often the stream says that it holds too much."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def make_stream(
    *, buffer_bytes: int = 2**20, overflow: Overflow | None = None, pace: ReaderPace | None = None
) -> TokenStream:
    text = AnswerText(NullTokenizer(32_000), stop_texts=(), stop_token_ids=frozenset())
    return TokenStream(
        link_id=1,
        attempt=0,
        first_offset=0,
        text=text,
        buffer_bytes=buffer_bytes,
        on_overflow=overflow or Overflow(),
        pace=pace or ReaderPace(),
        clock_s=lambda: 1.0,
    )


def fill(stream: TokenStream, overflow: Overflow, *, num_alternatives: int | None = None) -> int:
    """Tokens until it overflows; their numbers and words are objects of their own, as the link's are."""
    count = 0
    while not overflow.count:
        logprobs: tuple[TokenLogprobs, ...] = ()
        if num_alternatives is not None:
            top = tuple((40_000 + count + index, -0.5 * count) for index in range(num_alternatives))
            logprobs = (TokenLogprobs(logprob=-0.25 * count, top=top),)
        stream.deliver(Piece(f" {count:04x}", (10_000 + count,), False, 0), None, logprobs)
        count += 1
    return count


@pytest.mark.parametrize("num_alternatives", [None, 0, 5])
def test_what_waits_takes_no_more_memory_than_it_may(num_alternatives: int | None) -> None:
    overflow = Overflow()
    stream = make_stream(buffer_bytes=MIB, overflow=overflow)
    tracemalloc.start()
    fill(stream, overflow, num_alternatives=num_alternatives)
    # Threads that other tests left behind may take memory of their own meanwhile.
    ours = [tracemalloc.Filter(True, file) for file in (token_stream.__file__, __file__)]
    held_bytes = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces)
    tracemalloc.stop()
    # Growing arrays keep an eighth of room.
    assert MIB / 2 < held_bytes < MIB * 9 / 8 + 4096


async def test_what_waited_comes_as_one_batch() -> None:
    overflow = Overflow()
    stream = make_stream(buffer_bytes=MIB, overflow=overflow)
    stream.deliver(Piece("né", (70_000,), False, 0), None)
    stream.deliver(Piece("", (7,), False, 0), None)
    stream.deliver(Piece("e 🙂", (), False, 0), Finished(reason=FinishReason.LENGTH))
    batch = await stream.next()
    assert (batch.text, batch.token_ids) == ("née 🙂", (70_000, 7))
    assert batch.end is not None
    assert overflow.count == 0


async def test_text_counts_as_well_as_tokens() -> None:
    overflow = Overflow()
    stream = make_stream(buffer_bytes=100, overflow=overflow)
    stream.deliver(Piece("x" * 92, (1, 2), False, 0), None)
    assert overflow.count == 0
    stream.deliver(Piece("y", (), False, 0), None)
    assert overflow.count == 1


async def test_what_comes_faster_than_the_pace_goes_along_with_the_next_message() -> None:
    pace = ReaderPace()
    stream = make_stream(pace=pace)
    pace.num_streams = MAX_MESSAGES_PER_S
    assert pace.gap_s == MAX_GAP_S
    stream.deliver(Piece("a", (1,), False, 0), None)
    assert (await stream.next()).text == "a"
    reading = asyncio.ensure_future(stream.next())
    for text in ("b", "c"):
        stream.deliver(Piece(text, (2,), False, 0), None)
        await asyncio.sleep(0)
    assert (await reading).text == "bc"


async def test_the_end_of_an_answer_does_not_wait_for_the_pace() -> None:
    pace = ReaderPace()
    stream = make_stream(pace=pace)
    pace.num_streams = MAX_MESSAGES_PER_S
    for text, end in (("a", None), ("b", Finished(reason=FinishReason.LENGTH))):
        stream.deliver(Piece(text, (1,), False, 0), end)
        reading = asyncio.ensure_future(stream.next())
        await asyncio.sleep(0)
        assert reading.done()


def test_only_streams_that_somebody_reads_share_the_pace() -> None:
    pace = ReaderPace()
    streams = [make_stream(pace=pace) for _ in range(3)]
    streams[0].abandon()
    streams[0].abandon()
    assert pace.num_streams == 2


async def test_readers_take_turns_in_the_order_of_asking() -> None:
    pace, written = ReaderPace(), []

    async def write(number: int) -> None:
        await pace.turn()
        written.append(number)

    writers = [asyncio.ensure_future(write(number)) for number in range(3 * MAX_MESSAGES_A_TURN)]
    writers[MAX_MESSAGES_A_TURN].cancel()
    largest = 0
    while not all(writer.done() for writer in writers):
        before = len(written)
        await asyncio.sleep(0)
        largest = max(largest, len(written) - before)
    assert largest == MAX_MESSAGES_A_TURN
    assert written == [number for number in range(3 * MAX_MESSAGES_A_TURN) if number != MAX_MESSAGES_A_TURN]


async def test_readers_that_come_later_go_behind_those_who_wait() -> None:
    pace, written = ReaderPace(), []

    async def write(name: str) -> None:
        await pace.turn()
        written.append(name)

    first = [asyncio.ensure_future(write("first")) for _ in range(2 * MAX_MESSAGES_A_TURN)]
    await asyncio.sleep(0)
    second = [asyncio.ensure_future(write("second")) for _ in range(2)]
    await asyncio.wait_for(asyncio.gather(*first, *second), 60)
    assert written[-2:] == ["second", "second"]
