"""A closed-loop gRPC client: `concurrency` streams in flight, the next starts when one ends.

An answer ends with its last token, as it does for a caller of the engine alone. Its bill comes on the same
stream and is read beside the next answer. How long it took is measured by itself: `PROMISED_MS` is promised,
and callers here let the router wait for longer, so that late bills show.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.grpc_connection import GrpcConnection
from bench.record import RequestTimes
from bench.workload import Workload
from protos import wattline_inference_pb2 as pb

METHOD = "/wattline.v1.Inference/Generate"
PROMISED_MS = 150.0
"""For 99 of 100 bills to be final, after the last token."""
ENERGY_WAIT_MS = 1000
"""The longest that a caller may ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer as its caller saw it, and its bill, which came `bill_wait_s` after the last token."""

    times: RequestTimes
    final: pb.Final
    bill_wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LineRun:
    """What the clients of one workload saw; `wall_s` is up to the last token of all.

    `energy_j` is None when any answer came without joules. A bill that was not final after `ENERGY_WAIT_MS`
    has that long in `energy_final_ms`, and a little more.
    """

    times: tuple[RequestTimes, ...]
    wall_s: float
    energy_j: float | None
    energy_source: str
    energy_final_share: float
    energy_final_ms: tuple[float, ...]

    @property
    def share_in_time(self) -> float:
        """Of the bills: final within `PROMISED_MS` of the last token."""
        return sum(one <= PROMISED_MS for one in self.energy_final_ms) / len(self.energy_final_ms)


async def run_closed_loop(address: str, model: str, workload: Workload) -> LineRun:
    """Send every prompt of the workload once. Raises CallFailed, or RuntimeError, when a stream fails."""
    requests = iter([_request(model, prompt, workload.output_tokens) for prompt in workload.prompts])
    answers: list[asyncio.Task[Answer]] = []
    connection = await GrpcConnection.open(address)

    async def ask_in_turn() -> None:
        for request in requests:
            hearing = _Hearing()
            answers.append(group.create_task(hearing.hear(connection, request, workload.output_tokens)))
            await hearing.has_answer.wait()

    start_s = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(workload.concurrency):
                group.create_task(ask_in_turn())
    finally:
        connection.close()
    return _line_run([answer.result() for answer in answers], start_s)


def _line_run(answers: Sequence[Answer], start_s: float) -> LineRun:
    energies = [answer.final.energy for answer in answers]
    joules = [energy.total_j for energy in energies if energy.HasField("total_j")]
    return LineRun(
        times=tuple(answer.times for answer in answers),
        wall_s=max(answer.times.last_token_s for answer in answers) - start_s,
        energy_j=sum(joules) if len(joules) == len(energies) else None,
        energy_source=energies[0].source,
        energy_final_share=statistics.mean(one.state == pb.ENERGY_STATE_FINAL for one in energies),
        energy_final_ms=tuple(answer.bill_wait_s * 1e3 for answer in answers),
    )


class _Hearing:
    """What has come of one answer. Every message is read when it comes."""

    def __init__(self) -> None:
        self.has_answer = asyncio.Event()
        self._submitted_s = time.perf_counter()
        self._first_s = self._last_s = self._submitted_s
        self._received = 0
        self._final: pb.Final | None = None

    async def hear(self, connection: GrpcConnection, request: bytes, output_tokens: int) -> Answer:
        """Ask, and listen to the end of the stream, where the bill is."""
        await connection.call(METHOD, request, self._take).ended
        if self._received != output_tokens or self._final is None:
            raise RuntimeError(f"asked {output_tokens} tokens, got {self._received}, bill: {self._final}")
        times = RequestTimes(
            submitted_s=self._submitted_s,
            first_token_s=self._first_s,
            last_token_s=self._last_s,
            output_tokens=self._received,
        )
        return Answer(times=times, final=self._final, bill_wait_s=time.perf_counter() - self._last_s)

    def _take(self, message: bytes, now_s: float) -> None:
        response = pb.GenerateResponse.FromString(message)
        if response.HasField("final"):
            self._final = response.final
            return
        delta = response.delta
        if num_tokens := len(delta.token_ids):
            self._last_s = now_s
            self._first_s = self._first_s if self._received else now_s
            self._received += num_tokens
        if delta.finish_reason:
            self.has_answer.set()


def _request(model: str, prompt: Sequence[int], output_tokens: int) -> bytes:
    request = pb.GenerateRequest(
        model=model,
        tokens=pb.TokenIds(ids=prompt),
        sampling=pb.Sampling(temperature=0.0),
        limits=pb.Limits(max_tokens=output_tokens, ignore_eos=True),
        energy_wait_ms=ENERGY_WAIT_MS,
    )
    return request.SerializeToString()
