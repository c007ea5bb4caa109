"""A closed-loop gRPC client: `concurrency` streams in flight, the next starts when one ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc

from bench.record import RequestTimes
from bench.workload import Workload
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class LineRun:
    """What the clients of one workload saw. `energy_j` is None when any answer came without joules."""

    times: tuple[RequestTimes, ...]
    wall_s: float
    energy_j: float | None
    energy_source: str
    energy_final_share: float


async def run_closed_loop(address: str, model: str, workload: Workload) -> LineRun:
    """Send every prompt of the workload once. Raises grpc.RpcError when a stream fails."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        prompts = iter(workload.prompts)
        start_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            workers = [
                group.create_task(_worker(stub, model, workload.output_tokens, prompts))
                for _ in range(workload.concurrency)
            ]
        wall_s = time.perf_counter() - start_s
    done = [one for worker in workers for one in worker.result()]
    finals = [final for _, final in done]
    joules = [final.energy.total_j for final in finals if final.energy.HasField("total_j")]
    return LineRun(
        times=tuple(times for times, _ in done),
        wall_s=wall_s,
        energy_j=sum(joules) if len(joules) == len(finals) else None,
        energy_source=finals[0].energy.source if finals else "",
        energy_final_share=sum(one.energy.state == pb.ENERGY_STATE_FINAL for one in finals)
        / max(1, len(finals)),
    )


async def _worker(
    stub: pb_grpc.InferenceAsyncStub, model: str, output_tokens: int, prompts: Iterator[tuple[int, ...]]
) -> list[tuple[RequestTimes, pb.Final]]:
    return [await _one(stub, model, output_tokens, prompt) for prompt in prompts]


async def _one(
    stub: pb_grpc.InferenceAsyncStub, model: str, output_tokens: int, prompt: tuple[int, ...]
) -> tuple[RequestTimes, pb.Final]:
    request = pb.GenerateRequest(
        model=model,
        tokens=pb.TokenIds(ids=prompt),
        sampling=pb.Sampling(temperature=0.0),
        limits=pb.Limits(max_tokens=output_tokens, ignore_eos=True),
    )
    submitted_s = time.perf_counter()
    first_s = last_s = submitted_s
    received = 0
    final = pb.Final()
    async for response in stub.Generate(request):
        if response.HasField("final"):
            final = response.final
        elif response.delta.token_ids:
            last_s = time.perf_counter()
            first_s = first_s if received else last_s
            received += len(response.delta.token_ids)
    if received != output_tokens:
        raise RuntimeError(f"asked {output_tokens} tokens, got {received}")
    times = RequestTimes(
        submitted_s=submitted_s, first_token_s=first_s, last_token_s=last_s, output_tokens=received
    )
    return times, final
