"""What Ray Serve serves here: a deployment that streams one token message after another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ray import serve

from bench.edge.made_up import token_message
from protos import wattline_inference_pb2 as pb

MAX_ONGOING = 4096


@serve.deployment(max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})
class TokenStreamer:
    """The method's name is the one of the gRPC service."""

    async def Generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        for index in range(request.limits.max_tokens):
            yield token_message(index)
            # Without it one stream would run to its end before another is served.
            await asyncio.sleep(0)


app = TokenStreamer.bind()  # type: ignore[attr-defined]
