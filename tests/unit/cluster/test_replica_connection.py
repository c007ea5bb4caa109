"""What a step brings from a replica: to the right streams, once, and first to those that have nothing yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from cluster.link.detokenize_worker import DetokenizeWorker, StreamTokens, deliver, detokenize
from cluster.link.engine_job import EngineJob
from cluster.link.reader_pace import ReaderPace
from cluster.link.replica_connection import STALL_S, ReplicaConnection, ReplicaState
from cluster.link.token_stream import TokenStream
from cluster.request.errors import EngineFault, ReplicaStopped
from cluster.text.answer_text import AnswerText
from cluster.text.null_tokenizer import NullTokenizer
from protos import wattline_link_pb2 as link
from replicas.request import SamplingParams
from replicas.strict_messages import MalformedMessage


class Worker(DetokenizeWorker):
    """Makes text at once, and remembers the steps."""

    def __init__(self) -> None:
        self.steps: list[Sequence[StreamTokens]] = []

    def submit(self, step: Sequence[StreamTokens]) -> None:
        self.steps.append(step)
        deliver([detokenize(*entry) for entry in step])


def make_connection(worker: Worker, clock_s: Callable[[], float] = lambda: 1.0) -> ReplicaConnection:
    return ReplicaConnection(
        hello=link.Hello(replica_id="r", model="m", lanes=1, max_sequences=4, block_tokens=16),
        epoch=1,
        max_waiting=4,
        freeze_s=2.0,
        worker=worker,
        pace=ReaderPace(),
        clock_s=clock_s,
    )


def submit(connection: ReplicaConnection) -> TokenStream:
    job = EngineJob(
        prompt_ids=(1, 2),
        sampling=SamplingParams(),
        max_tokens=8,
        stop_token_ids=frozenset(),
        priority=0,
        deadline_s=None,
        lane=0,
        cache_salt=b"",
        traceparent="",
        text=AnswerText(NullTokenizer(32_000), stop_texts=(), stop_token_ids=frozenset()),
        buffer_bytes=2**20,
        on_overflow=lambda: None,
    )
    return connection.submit(job)[0]


def make_step(*runs: tuple[int, int, int]) -> link.StepOutput:
    """Of (request, offset, token)."""
    return link.StepOutput(
        tokens=link.TokenColumns(
            request_ids=[run[0] for run in runs],
            attempts=[0] * len(runs),
            first_offsets=[run[1] for run in runs],
            token_ids=[run[2] for run in runs],
        )
    )


async def test_who_has_no_token_yet_is_served_first() -> None:
    worker = Worker()
    connection = make_connection(worker)
    early, late = submit(connection), submit(connection)
    connection.take_step(make_step((1, 0, 10)))
    assert connection.take_step(make_step((1, 1, 11), (2, 0, 20))) == 2
    assert worker.steps[1] == [(late, (20,), (), None), (early, (11,), (), None)]


async def test_a_duplicate_and_what_nobody_asked_for_are_dropped() -> None:
    worker = Worker()
    connection = make_connection(worker)
    stream = submit(connection)
    connection.take_step(make_step((1, 0, 10)))
    assert connection.take_step(make_step((1, 0, 10), (9, 0, 30), (1, 1, 11))) == 1
    assert worker.steps[1] == [(stream, (11,), (), None)]
    assert connection.dropped_deltas == 2


async def test_a_gap_ends_the_answer() -> None:
    connection = make_connection(Worker())
    stream = submit(connection)
    connection.take_step(make_step((1, 1, 11)))
    assert isinstance(await stream.wait_end(), EngineFault)
    assert connection.in_flight == 0


async def test_a_gap_at_a_replica_that_reads_no_commands_loses_its_streams() -> None:
    connection = make_connection(Worker())
    streams = [submit(connection), submit(connection)]
    while not connection.commands.full():
        connection.commands.put_nowait(link.ToReplica())
    connection.take_step(make_step((1, 1, 11)))
    assert connection.closed.is_set()
    assert [type(await stream.wait_end()) for stream in streams] == [ReplicaStopped, ReplicaStopped]


async def test_columns_that_do_not_fit_are_no_message() -> None:
    connection = make_connection(Worker())
    submit(connection)
    step = make_step((1, 0, 10))
    step.tokens.token_ids.append(11)
    with pytest.raises(MalformedMessage):
        connection.take_step(step)


async def test_a_replica_is_silent_only_while_somebody_listens() -> None:
    """A router that was paused itself finds what was said meanwhile; until then it blames nobody."""
    now_s = 0.0
    connection = make_connection(Worker(), lambda: now_s)
    connection.check_progress()
    now_s += 3600.0
    connection.check_progress()
    states = [connection.state]
    for _ in range(round(STALL_S / 0.1) + 1):
        now_s += 0.1
        connection.check_progress()
    states.append(connection.state)
    connection.heard()
    states.append(connection.state)
    assert states == [ReplicaState.READY, ReplicaState.STALLED, ReplicaState.READY]
