"""`inference.GRPCInferenceService`: what Triton's and KServe's clients call. Tensors in, `Streams` at work.

`ModelInfer` gives the whole answer; `ModelStreamInfer` carries many requests at once, each with as many
responses as its answer has pieces, and an error of one is a message, not the end of the others.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TypeAlias

import grpc

from cluster.link.replica_pool import ReplicaPool
from cluster.oip.asks import InferAsk, infer_ask
from cluster.oip.descriptions import MODEL_VERSION, model_config, model_metadata, server_metadata
from cluster.oip.responses import Choices
from cluster.oip.wire_name import SERVICE
from cluster.request.answer import Completed
from cluster.request.completion import TokenPrompt
from cluster.request.errors import UnknownModel
from cluster.router.caller import Caller
from cluster.router.rpc import Rpc, RpcGuard
from cluster.router.streams import Streams
from cluster.router.wire import energy_trailers
from cluster.served_model import ServedModel, find_model
from cluster.text.text_threads import TextThreads
from protos import wattline_oip_pb2 as pb
from protos import wattline_oip_pb2_grpc as pb_grpc
from replicas.strict_messages import MalformedMessage

MAX_REQUESTS_PER_STREAM = 256
"""Under way at once; more wait unread, which the caller feels."""

InferContext: TypeAlias = "grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelInferResponse]"
StreamContext: TypeAlias = "grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelStreamInferResponse]"
AnyContext: TypeAlias = "grpc.aio.ServicerContext[object, object]"
Responses: TypeAlias = AsyncGenerator[tuple[pb.ModelInferResponse, Completed | None], None]


class OipServicer(pb_grpc.GRPCInferenceServiceServicer):
    """Holds no state of its own."""

    def __init__(
        self,
        *,
        guard: RpcGuard,
        models: Mapping[str, ServedModel],
        pool: ReplicaPool,
        streams: Streams,
        threads: TextThreads,
    ) -> None:
        self._guard = guard
        self._models = models
        self._pool = pool
        self._streams = streams
        self._threads = threads

    async def ServerLive(self, _: pb.ServerLiveRequest, context: AnyContext) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _: pb.ServerReadyRequest, context: AnyContext) -> pb.ServerReadyResponse:
        """Whether any model can answer now."""
        return pb.ServerReadyResponse(ready=any(self._is_ready(name) for name in self._models))

    async def ModelReady(self, request: pb.ModelReadyRequest, context: AnyContext) -> pb.ModelReadyResponse:
        """What is not served is not ready, and no error: so says Triton."""
        async with self._guard.call(context, f"{SERVICE}/ModelReady") as rpc:
            try:
                model = self._find(request.name, request.version, rpc)
            except UnknownModel:
                return pb.ModelReadyResponse(ready=False)
            return pb.ModelReadyResponse(ready=self._is_ready(model.name))

    async def ServerMetadata(
        self, _: pb.ServerMetadataRequest, context: AnyContext
    ) -> pb.ServerMetadataResponse:
        async with self._guard.call(context, f"{SERVICE}/ServerMetadata"):
            return server_metadata()

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: AnyContext
    ) -> pb.ModelMetadataResponse:
        async with self._guard.call(context, f"{SERVICE}/ModelMetadata") as rpc:
            return model_metadata(self._find(request.name, request.version, rpc).name)

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: AnyContext
    ) -> pb.ModelConfigResponse:
        async with self._guard.call(context, f"{SERVICE}/ModelConfig") as rpc:
            return model_config(self._find(request.name, request.version, rpc).name)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: InferContext) -> pb.ModelInferResponse:
        """One response, `stream` or not."""
        async with self._guard.call(context, f"{SERVICE}/ModelInfer", is_inference=True) as rpc:
            model = self._find(request.model_name, request.model_version, rpc, prefix="model_")
            rpc.model = model.name
            ask = replace(infer_ask(request, model.bounds, _draw_seed), is_stream=False)
            async with aclosing(self._respond(ask, model, rpc)) as responses:
                async for response, end in responses:
                    if end is not None:
                        energy = energy_trailers(end.energy, is_settled=end.is_settled)
                        context.set_trailing_metadata((*rpc.id_metadata, *energy))
                    whole = response
        return whole

    async def ModelStreamInfer(  # type: ignore[override]  # As in `cluster/router/service.py`.
        self, requests: AsyncIterator[pb.ModelInferRequest], context: StreamContext
    ) -> None:
        """Answer requests side by side until the caller has no more."""
        async with self._guard.call(context, f"{SERVICE}/ModelStreamInfer"):
            writing, room = asyncio.Lock(), asyncio.Semaphore(MAX_REQUESTS_PER_STREAM)

            async def write(response: pb.ModelStreamInferResponse) -> None:
                async with writing:
                    await context.write(response)

            async def answer(request: pb.ModelInferRequest) -> None:
                try:
                    await self._answer_one(request, context, write)
                finally:
                    room.release()

            malformed: MalformedMessage | None = None
            async with asyncio.TaskGroup() as answering:
                try:
                    async for request in requests:
                        await room.acquire()
                        answering.create_task(answer(request))
                except MalformedMessage as error:
                    malformed = error  # Behind the answers to what came before.
            if malformed is not None:
                raise malformed

    async def _answer_one(
        self,
        request: pb.ModelInferRequest,
        context: StreamContext,
        write: Callable[[pb.ModelStreamInferResponse], Awaitable[None]],
    ) -> None:
        async def tell(message: str) -> None:
            named = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
            await write(pb.ModelStreamInferResponse(error_message=message, infer_response=named))

        async with self._guard.part(context, f"{SERVICE}/ModelStreamInfer", tell) as rpc:
            self._guard.identify(rpc, context)
            model = self._find(request.model_name, request.model_version, rpc, prefix="model_")
            rpc.model = model.name
            ask = infer_ask(request, model.bounds, _draw_seed)
            async with aclosing(self._respond(ask, model, rpc)) as responses:
                async for response, _ in responses:
                    await write(pb.ModelStreamInferResponse(infer_response=response))

    async def _respond(self, ask: InferAsk, model: ServedModel, rpc: Rpc) -> Responses:
        """The responses to one request; the last one comes with its end."""
        completion = ask.completion
        prompt_tokens = 0
        if "num_input_tokens" in ask.outputs:
            prompt_ids = await self._streams.tokenize(model, completion.prompt)
            completion, prompt_tokens = (
                replace(completion, prompt=TokenPrompt(ids=prompt_ids)),
                len(prompt_ids),
            )
        choices = Choices(ask, model.tokenizer.decode, prompt_tokens=prompt_tokens)
        async with aclosing(self._streams.run(completion, _caller(ask, rpc))) as events:
            async for event in events:
                if isinstance(event, Completed):
                    yield await self._threads.run(partial(choices.take, event), size=choices.size), event
                    continue
                choices.add(event)
                if ask.is_stream and not event.is_empty:
                    yield await self._threads.run(choices.take, size=choices.size), None

    def _find(self, name: str, version: str, rpc: Rpc, *, prefix: str = "") -> ServedModel:
        """`prefix`: of the two fields in the request."""
        if version not in ("", MODEL_VERSION):
            raise UnknownModel(field=f"{prefix}version", name=version, served=(MODEL_VERSION,))
        return find_model(self._models, name, rpc.identity, field=f"{prefix}name")

    def _is_ready(self, name: str) -> bool:
        """Whether it takes requests now."""
        return bool(self._pool.ready(name)) and not self._streams.is_stopping


def _caller(ask: InferAsk, rpc: Rpc) -> Caller:
    """The request's own time limit counts beside that of the call."""
    arrived_s = monotonic()

    def time_remaining_s() -> float | None:
        limits = [rpc.time_remaining_s()]
        if ask.timeout_s is not None:
            limits.append(ask.timeout_s - (monotonic() - arrived_s))
        return min((limit for limit in limits if limit is not None), default=None)

    async def accept() -> None:
        """Nothing to say before the first response."""

    return Caller(
        request_id=rpc.request_id,
        tenant=rpc.identity.tenant,
        span=rpc.span,
        time_remaining_s=time_remaining_s,
        accept=accept,
        interrupt=rpc.interrupt,
    )


def _draw_seed() -> int:
    return secrets.randbits(64)
