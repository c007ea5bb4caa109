"""A bare grpc.aio relay before the bare echo: what Python's gRPC alone takes for two hops, as the line has.

`python -m bench.edge.relay_server ADDRESS_OF_THE_ECHO`; see `child.py` for what it says and when it ends.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc

from bench.edge.bare import serve_bare
from bench.edge.child import keep_stdout
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc


class RelayServicer(pb_grpc.InferenceServicer):
    """Gives every message of the echo on as it comes."""

    def __init__(self, echo: pb_grpc.InferenceAsyncStub) -> None:
        self._echo = echo

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[pb.GenerateResponse]:
        async for response in self._echo.Generate(request):
            yield response


async def main() -> None:
    out_fd = keep_stdout()
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        relay = RelayServicer(pb_grpc.InferenceStub(channel))  # type: ignore[abstract]
        await serve_bare(relay, role="relay", out_fd=out_fd)


if __name__ == "__main__":
    asyncio.run(main())
