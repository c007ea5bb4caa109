"""A bare grpc.aio relay before the bare echo: what Python's gRPC alone takes for two hops, as the line has.

`python -m bench.edge.relay_server ADDRESS_OF_THE_ECHO`; see `child.py` for what it says and when it ends.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from importlib.metadata import version

import grpc

from bench.edge.child import Listening, keep_stdout, serve_until_told
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
        server = grpc.aio.server()
        relay = RelayServicer(pb_grpc.InferenceStub(channel))  # type: ignore[abstract]
        pb_grpc.add_InferenceServicer_to_server(relay, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        listening = Listening(
            address=f"127.0.0.1:{port}", pids={"relay": os.getpid()}, version=f"grpcio {version('grpcio')}"
        )
        await serve_until_told(listening, out_fd)
        await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
