"""An engine behind a bare grpc.aio server: the least that a server in Python adds, nothing else of ours.

No router, link, supervisor, Ray, text, books or joules: one process writes what the engine says to whoever
asked. `python -m bench.bare_server SECTION`, a model's section of wattline.yaml as JSON; see `edge/child.py`
for what it says and when it ends.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator
from importlib.metadata import version

import grpc

from bench.edge.child import Listening, keep_stdout, serve_until_told
from bench.engine import EngineUnderTest
from bench.suites import setup_of
from cluster.config import ModelSection
from cluster.servers import event_loop
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc
from replicas.request import GenerationRequest, SequenceDelta


class BareServicer(pb_grpc.InferenceServicer):
    """One message a token, as the engine says it. Mutable: the answers under way, by request id."""

    def __init__(self, engine: EngineUnderTest) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Queue[SequenceDelta]] = {}

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[pb.GenerateResponse]:
        request_id = next(self._numbers)
        answer = self._answers[request_id] = asyncio.Queue()
        await self._engine.submit(
            GenerationRequest(
                request_id=request_id,
                prompt_ids=tuple(request.tokens.ids),
                max_tokens=request.limits.max_tokens,
            )
        )
        is_finished = False
        while not is_finished:
            said = await answer.get()
            is_finished = said.finish is not None
            reason = pb.FINISH_REASON_LENGTH if is_finished else pb.FINISH_REASON_UNSPECIFIED
            yield pb.GenerateResponse(delta=pb.Delta(token_ids=said.token_ids, finish_reason=reason))
        del self._answers[request_id]
        yield pb.GenerateResponse(final=pb.Final())

    async def read_engine(self) -> None:
        """Until cancelled. Raises RankLost."""
        while True:
            for said in (await self._engine.next_step()).all_deltas():
                self._answers[said.request_id].put_nowait(said)


async def main() -> None:
    out_fd = keep_stdout()
    section = ModelSection.model_validate_json(sys.argv[1])
    async with EngineUnderTest(setup_of(section)) as engine:
        servicer = BareServicer(engine)  # type: ignore[abstract]
        server = grpc.aio.server()
        pb_grpc.add_InferenceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        listening = Listening(
            address=f"127.0.0.1:{port}",
            pids={"server": os.getpid(), "rank": engine.processes[0].pid},
            version=f"grpcio {version('grpcio')}",
        )
        reading = asyncio.create_task(servicer.read_engine())
        telling = asyncio.create_task(serve_until_told(listening, out_fd))
        await asyncio.wait((reading, telling), return_when=asyncio.FIRST_COMPLETED)
        reading.cancel()
        await server.stop(None)


if __name__ == "__main__":
    event_loop.run(main())
