"""Many streams at once, some cancelled, some late: each must end once, and whole answers must be known ones.

Used by `integration/test_demo_line.py` (seconds) and the soak test (a minute).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import grpc

from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc

DEADLINE_S = (0.005, 0.4)
PATIENCE_S = 300.0
CANCEL_AFTER_TOKENS_MAX = 12


class Ending(Enum):
    """What the caller means to do with a stream."""

    WHOLE = auto()
    CANCEL = auto()
    DEADLINE = auto()


ENDINGS = (Ending.WHOLE,) * 6 + (Ending.CANCEL,) * 2 + (Ending.DEADLINE,) * 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt as token ids, and the tokens it yields when sent alone."""

    model: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    answer_ids: tuple[int, ...]


@dataclass(slots=True)
class LoadReport:
    """`faults` holds one sentence per broken promise; it must end empty."""

    endings: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    tokens: int = 0


async def ask_alone(address: str, model: str, prompt_ids: Sequence[int], max_tokens: int) -> Question:
    """Send one prompt with nothing else in flight and keep its answer."""
    async with grpc.aio.insecure_channel(address) as channel:
        stream = pb_grpc.InferenceStub(channel).Generate(make_request(model, prompt_ids, max_tokens))
        ids = [token async for response in stream for token in response.delta.token_ids]
    return Question(model=model, prompt_ids=tuple(prompt_ids), max_tokens=max_tokens, answer_ids=tuple(ids))


async def run_mixed_load(
    address: str, questions: Sequence[Question], *, num_streams: int, duration_s: float, seed: int
) -> LoadReport:
    """Keep `num_streams` streams in flight for `duration_s`, then wait for the last ones."""
    report = LoadReport()
    end_s = time.monotonic() + duration_s
    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as group:
        stub = pb_grpc.InferenceStub(channel)
        for index in range(num_streams):
            group.create_task(_client(stub, questions, random.Random(seed * 1000 + index), end_s, report))
    return report


async def _client(
    stub: pb_grpc.InferenceAsyncStub,
    questions: Sequence[Question],
    rng: random.Random,
    end_s: float,
    report: LoadReport,
) -> None:
    while time.monotonic() < end_s:
        await _stream(stub, rng.choice(questions), rng.choice(ENDINGS), rng, report)


async def _stream(
    stub: pb_grpc.InferenceAsyncStub,
    question: Question,
    ending: Ending,
    rng: random.Random,
    report: LoadReport,
) -> None:
    timeout_s = rng.uniform(*DEADLINE_S) if ending is Ending.DEADLINE else PATIENCE_S
    cancel_after = rng.randrange(CANCEL_AFTER_TOKENS_MAX) if ending is Ending.CANCEL else None
    call = stub.Generate(
        make_request(question.model, question.prompt_ids, question.max_tokens), timeout=timeout_s
    )
    ids: list[int] = []
    num_finals = num_after_final = 0
    try:
        if cancel_after == 0:
            call.cancel()
        async for response in call:
            num_after_final += bool(num_finals)
            num_finals += response.HasField("final")
            ids += response.delta.token_ids
            if cancel_after is not None and len(ids) >= cancel_after:
                call.cancel()
    except (grpc.RpcError, asyncio.CancelledError):
        if (task := asyncio.current_task()) and task.cancelling():
            raise
    code = await call.code()
    report.endings[f"{ending.name}:{code.name}"] += 1
    report.tokens += len(ids)
    report.faults += _faults(question, ending, code, ids, num_finals, num_after_final)


def _faults(
    question: Question,
    ending: Ending,
    code: grpc.StatusCode,
    ids: list[int],
    num_finals: int,
    num_after_final: int,
) -> list[str]:
    allowed = {
        Ending.WHOLE: {grpc.StatusCode.OK},
        Ending.CANCEL: {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED},
        # A router that foresees that the deadline cannot be met refuses at once.
        Ending.DEADLINE: {
            grpc.StatusCode.OK,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        },
    }[ending]
    name = f"{question.model}, {len(question.prompt_ids)} prompt tokens, {ending.name}"
    faults = []
    if code not in allowed:
        faults.append(f"{name}: ended with {code.name}")
    if num_after_final or num_finals > 1 or (code is grpc.StatusCode.OK and num_finals != 1):
        faults.append(f"{name}: {num_finals} finals, {num_after_final} messages behind one, {code.name}")
    whole = code is grpc.StatusCode.OK
    if tuple(ids) != (question.answer_ids if whole else question.answer_ids[: len(ids)]):
        faults.append(f"{name}: tokens {ids} instead of {list(question.answer_ids)}")
    return faults


def make_request(model: str, prompt_ids: Sequence[int], max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=model,
        tokens=pb.TokenIds(ids=prompt_ids),
        sampling=pb.Sampling(temperature=0.0),
        limits=pb.Limits(max_tokens=max_tokens),
    )
