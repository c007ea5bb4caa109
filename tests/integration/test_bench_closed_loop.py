"""A caller of the line asks again when it has its answer, whether or not its bill has come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from bench.closed_loop import run_closed_loop
from bench.workload import Workload
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc

WAIT_S = 100.0


class LateBills(pb_grpc.InferenceServicer):
    """Sends no bill before as many requests have come as there will be."""

    def __init__(self, num_requests: int) -> None:
        self._left = num_requests
        self._all_came = asyncio.Event()

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[pb.GenerateResponse]:
        self._left -= 1
        if not self._left:
            self._all_came.set()
        yield pb.GenerateResponse(delta=pb.Delta(token_ids=[7], finish_reason=pb.FINISH_REASON_LENGTH))
        await self._all_came.wait()
        energy = pb.Energy(total_j=2.0, source="fake", state=pb.ENERGY_STATE_FINAL)
        yield pb.GenerateResponse(final=pb.Final(energy=energy))


async def test_the_next_request_does_not_wait_for_the_bill() -> None:
    server = grpc.aio.server()
    pb_grpc.add_InferenceServicer_to_server(LateBills(3), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    workload = Workload(name="mix", prompts=((1,), (2,), (3,)), output_tokens=1, concurrency=1)
    try:
        async with asyncio.timeout(WAIT_S):
            run = await run_closed_loop(f"127.0.0.1:{port}", "m", workload)
    finally:
        await server.stop(None)
    assert [one.output_tokens for one in run.times] == [1, 1, 1]
    assert len(run.energy_final_ms) == 3 and 0.0 <= run.share_in_time <= 1.0
    assert (run.energy_j, run.energy_source, run.energy_final_share) == (6.0, "fake", 1.0)
