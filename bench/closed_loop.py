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
from typing import TypeAlias

import grpc

from bench.record import RequestTimes
from bench.workload import Workload
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc

PROMISED_MS = 150.0
"""For 99 of 100 bills to be final, after the last token."""
ENERGY_WAIT_MS = 1000
"""The longest that a caller may ask for."""

Call: TypeAlias = "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]"


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
    """Send every prompt of the workload once. Raises grpc.RpcError when a stream fails."""
    prompts = iter(workload.prompts)
    answers: list[asyncio.Task[Answer]] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)

        async def ask_in_turn() -> None:
            for prompt in prompts:
                has_answer = asyncio.Event()
                call = stub.Generate(_request(model, prompt, workload.output_tokens))
                answers.append(group.create_task(_read(call, workload.output_tokens, has_answer)))
                await has_answer.wait()

        start_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(workload.concurrency):
                group.create_task(ask_in_turn())
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


async def _read(call: Call, output_tokens: int, has_answer: asyncio.Event) -> Answer:
    """Read a stream to its end; tells when the answer is complete."""
    submitted_s = time.perf_counter()
    first_s = last_s = submitted_s
    received = 0
    final = pb.Final()
    async for response in call:
        if response.HasField("final"):
            final = response.final
            continue
        if response.delta.token_ids:
            last_s = time.perf_counter()
            first_s = first_s if received else last_s
            received += len(response.delta.token_ids)
        if response.delta.finish_reason:
            has_answer.set()
    if received != output_tokens:
        raise RuntimeError(f"asked {output_tokens} tokens, got {received}")
    times = RequestTimes(
        submitted_s=submitted_s, first_token_s=first_s, last_token_s=last_s, output_tokens=received
    )
    return Answer(times=times, final=final, bill_wait_s=time.perf_counter() - last_s)


def _request(model: str, prompt: Sequence[int], output_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=model,
        tokens=pb.TokenIds(ids=prompt),
        sampling=pb.Sampling(temperature=0.0),
        limits=pb.Limits(max_tokens=output_tokens, ignore_eos=True),
        energy_wait_ms=ENERGY_WAIT_MS,
    )
