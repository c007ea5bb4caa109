"""Time to first token through the line and of the engine alone, under one and the same pattern of arrivals.

Each of a number of callers asks, reads its answer to the end, thinks for a while and asks again. What it asks
and how long it thinks is drawn from a seed, alike for both. Without the thinking, callers of the engine alone
would fall into step with it: all answers end together, all next ones begin together and meet an idle engine,
while those that come over a network arrive in the middle of a step, and its rest would count as added.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from bench.engine import EngineUnderTest
from bench.record import percentile
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc
from replicas.request import GenerationRequest

PROMPT_TOKENS_MIN, PROMPT_TOKENS_MAX = 16, 256
OUTPUT_TOKENS = 16
MIN_REQUESTS, MIN_REQUESTS_PER_CALLER = 32, 8
"""The median of fewer says little; the first of each caller begin together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Asked `thinking_s` after the caller's last answer."""

    number: int
    prompt_ids: tuple[int, ...]
    thinking_s: float


Ask = Callable[[Question], Awaitable[float]]
"""Asks one question, reads the answer to its end, and returns the milliseconds to its first token."""


def requests_per_caller(callers: int) -> int:
    """In one round."""
    return max(MIN_REQUESTS_PER_CALLER, MIN_REQUESTS // callers)


def draw_questions(
    *, callers: int, seed: int, vocab_size: int, answer_s: float
) -> list[tuple[Question, ...]]:
    """What each caller asks; it thinks for half as long as an answer takes, on average."""
    lots = random.Random(f"first-tokens-{seed}-{callers}")
    count = requests_per_caller(callers)
    return [
        tuple(
            Question(
                number=caller * count + index,
                prompt_ids=tuple(
                    lots.randrange(vocab_size // 8, vocab_size)
                    for _ in range(lots.randint(PROMPT_TOKENS_MIN, PROMPT_TOKENS_MAX))
                ),
                thinking_s=lots.uniform(0.0, answer_s),
            )
            for index in range(count)
        )
        for caller in range(callers)
    ]


async def time_questions(questions: Sequence[Sequence[Question]], ask: Ask) -> list[float]:
    """Milliseconds to the first token of every question, callers side by side."""

    async def call(own: Sequence[Question]) -> list[float]:
        waits_ms = []
        for question in own:
            await asyncio.sleep(question.thinking_s)
            waits_ms.append(await ask(question))
        return waits_ms

    async with asyncio.TaskGroup() as group:
        callers = [group.create_task(call(own)) for own in questions]
    return [wait_ms for caller in callers for wait_ms in caller.result()]


def ask_over_grpc(stub: pb_grpc.InferenceAsyncStub, model: str) -> Ask:
    """As any client of the line, or of the echo, would."""

    async def ask(question: Question) -> float:
        request = pb.GenerateRequest(
            model=model,
            tokens=pb.TokenIds(ids=question.prompt_ids),
            sampling=pb.Sampling(temperature=0.0),
            limits=pb.Limits(max_tokens=OUTPUT_TOKENS, ignore_eos=True),
            energy_wait_ms=0,
        )
        first_ms = None
        since_s = time.perf_counter()
        async for response in stub.Generate(request):
            if first_ms is None and response.delta.token_ids:
                first_ms = (time.perf_counter() - since_s) * 1e3
        assert first_ms is not None, "an answer without an error has tokens"
        return first_ms

    return ask


class EngineCallers:
    """Several callers of one engine behind its socket. Use as an async context; owns the reading of it."""

    def __init__(self, engine: EngineUnderTest) -> None:
        self._engine = engine
        self._first: dict[int, asyncio.Future[float]] = {}
        self._ended: dict[int, asyncio.Future[None]] = {}

    async def __aenter__(self) -> EngineCallers:
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._reading.cancel()

    async def ask(self, question: Question) -> float:
        loop = asyncio.get_running_loop()
        first = self._first[question.number] = loop.create_future()
        ended = self._ended[question.number] = loop.create_future()
        since_s = time.perf_counter()
        await self._engine.submit(
            GenerationRequest(
                request_id=question.number, prompt_ids=question.prompt_ids, max_tokens=OUTPUT_TOKENS
            )
        )
        await asyncio.wait((ended, self._reading), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            await self._reading  # It raises: the engine is lost.
        first_ms: float = (first.result() - since_s) * 1e3
        return first_ms

    async def _read(self) -> None:
        while True:
            for delta in (await self._engine.next_step()).all_deltas():
                if delta.error is not None:
                    raise RuntimeError(f"question {delta.request_id}: {delta.error}")
                first = self._first[delta.request_id]
                if delta.token_ids and not first.done():
                    first.set_result(time.perf_counter())
                if delta.finish is not None:
                    self._ended[delta.request_id].set_result(None)


def ttft_row(
    callers: int,
    *,
    line_ms: Sequence[float],
    engine_ms: Sequence[float],
    echo_ms: Sequence[float],
    relay_ms: Sequence[float],
) -> dict[str, object]:
    """Echo and relay are of the same schema: what gRPC takes for one hop, and for two as the line has."""
    line_p50, engine_p50 = statistics.median(line_ms), statistics.median(engine_ms)
    line_p99, engine_p99 = percentile(line_ms, 99), percentile(engine_ms, 99)
    return {
        "streams": callers,
        "requests": len(line_ms),
        "line_ttft_ms_p50": round(line_p50, 3),
        "engine_ttft_ms_p50": round(engine_p50, 3),
        "echo_ttft_ms_p50": round(statistics.median(echo_ms), 3),
        "relay_ttft_ms_p50": round(statistics.median(relay_ms), 3),
        "added_ttft_ms_p50": round(line_p50 - engine_p50, 3),
        "added_ttft_ms_p99": round(line_p99 - engine_p99, 3),
    }
