"""A bare grpc.aio server that streams one message a token: what Python's gRPC alone can do.

`python -m bench.edge.echo_server`; see `child.py` for what it says and when it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from bench.edge.bare import serve_bare
from bench.edge.child import keep_stdout
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
    await serve_bare(EchoServicer(), role="server", out_fd=out_fd)  # type: ignore[abstract]


if __name__ == "__main__":
    asyncio.run(main())
