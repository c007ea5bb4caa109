"""A bare grpc.aio server that streams one message a token: what Python's gRPC alone can do.

`python -m bench.edge.echo_server`; see `child.py` for what it says and when it ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from importlib.metadata import version

import grpc

from bench.edge.child import Listening, keep_stdout, serve_until_told
from bench.edge.made_up import token_message
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc


class EchoServicer(pb_grpc.InferenceServicer):
    """Holds no state."""

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[pb.GenerateResponse]:
        for index in range(request.limits.max_tokens):
            yield token_message(index)


async def main() -> None:
    out_fd = keep_stdout()
    server = grpc.aio.server()
    pb_grpc.add_InferenceServicer_to_server(EchoServicer(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    listening = Listening(
        address=f"127.0.0.1:{port}", pids={"server": os.getpid()}, version=f"grpcio {version('grpcio')}"
    )
    await serve_until_told(listening, out_fd)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
