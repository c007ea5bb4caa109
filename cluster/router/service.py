"""`wattline.v1.Inference`: protobuf in, `Streams` at work, protobuf out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from typing import TypeAlias

import grpc

from cluster.link.replica_pool import ReplicaPool
from cluster.request.answer import TextDelta
from cluster.request.completion import Completion
from cluster.request.errors import InvalidRequest, UnknownRequest
from cluster.request.validation import parse_chat, parse_generate, parse_text, parse_token_ids, parse_turns
from cluster.router import wire
from cluster.router.caller import Caller
from cluster.router.energy_record import EnergyRecord
from cluster.router.rpc import Rpc, RpcGuard
from cluster.router.siblings import Siblings
from cluster.router.streams import Streams
from cluster.served_model import ServedModel, find_model
from cluster.text.text_threads import TextThreads
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name

GenerateContext: TypeAlias = "grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]"
ChatContext: TypeAlias = "grpc.aio.ServicerContext[pb.ChatRequest, pb.GenerateResponse]"
TokenizeContext: TypeAlias = "grpc.aio.ServicerContext[pb.TokenizeRequest, pb.TokenizeResponse]"
DetokenizeContext: TypeAlias = "grpc.aio.ServicerContext[pb.DetokenizeRequest, pb.DetokenizeResponse]"
ListModelsContext: TypeAlias = "grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse]"
GetEnergyContext: TypeAlias = "grpc.aio.ServicerContext[pb.GetEnergyRequest, pb.GetEnergyResponse]"


# The generated signature of a streaming method wants an iterator. A coroutine that writes is as good for
# gRPC, and makes sure that a call's clean-up runs before the call is over: hence the `override` exceptions.
class InferenceServicer(pb_grpc.InferenceServicer):
    """Holds no state of its own."""

    def __init__(
        self,
        *,
        guard: RpcGuard,
        models: Mapping[str, ServedModel],
        pool: ReplicaPool,
        streams: Streams,
        record: EnergyRecord,
        threads: TextThreads,
        siblings: Siblings,
    ) -> None:
        self._guard = guard
        self._models = models
        self._pool = pool
        self._streams = streams
        self._record = record
        self._threads = threads
        self._siblings = siblings

    async def Generate(  # type: ignore[override]
        self, request: pb.GenerateRequest, context: GenerateContext
    ) -> None:
        async with self._guard.call(context, f"{SERVICE}/Generate", is_inference=True) as rpc:
            model = self._find(request.model, rpc)
            await self._answer(parse_generate(request, model.bounds, _draw_seed), rpc, context)

    async def Chat(self, request: pb.ChatRequest, context: ChatContext) -> None:  # type: ignore[override]
        async with self._guard.call(context, f"{SERVICE}/Chat", is_inference=True) as rpc:
            model = self._find(request.model, rpc)
            await self._answer(parse_chat(request, model.bounds, _draw_seed), rpc, context)

    async def Tokenize(self, request: pb.TokenizeRequest, context: TokenizeContext) -> pb.TokenizeResponse:
        async with self._guard.call(context, f"{SERVICE}/Tokenize") as rpc:
            model = self._find(request.model, rpc)
            match request.WhichOneof("input"):
                case "text":
                    ids = await self._streams.tokenize(
                        model, parse_text(request.text, model.bounds, field="text")
                    )
                case "conversation":
                    prompt = parse_turns(request.conversation.messages, model.bounds)
                    ids = await self._streams.tokenize(model, prompt)
                case _:
                    raise InvalidRequest(
                        field="input", got="nothing", limit="text or conversation", fix="set one of them"
                    )
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: DetokenizeContext
    ) -> pb.DetokenizeResponse:
        async with self._guard.call(context, f"{SERVICE}/Detokenize") as rpc:
            model = self._find(request.model, rpc)
            ids = parse_token_ids(request.token_ids, model.bounds, field="token_ids")
            text = await self._threads.run(partial(model.tokenizer.decode, ids), size=len(ids))
        return pb.DetokenizeResponse(text=text)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: ListModelsContext
    ) -> pb.ListModelsResponse:
        async with self._guard.call(context, f"{SERVICE}/ListModels") as rpc:
            return pb.ListModelsResponse(
                models=[
                    self._describe(model)
                    for name, model in self._models.items()
                    if rpc.identity.may_use(name)
                ]
            )

    async def GetEnergy(
        self, request: pb.GetEnergyRequest, context: GetEnergyContext
    ) -> pb.GetEnergyResponse:
        async with self._guard.call(context, f"{SERVICE}/GetEnergy"):
            try:
                finished = self._record.find(request.request_id)
            except UnknownRequest:
                if (answer := await self._siblings.get_energy(request)) is None:
                    raise
                return answer
            return pb.GetEnergyResponse(
                energy=wire.energy_message(
                    finished.account.energy, finished.usage, is_settled=finished.account.is_settled
                ),
                usage=wire.usage_message(finished.usage),
            )

    async def _answer(self, completion: Completion, rpc: Rpc, context: GenerateContext | ChatContext) -> None:
        """Write every delta, then the one final message."""
        caller = Caller(
            request_id=rpc.request_id,
            tenant=rpc.identity.tenant,
            span=rpc.span,
            time_remaining_s=rpc.time_remaining_s,
            accept=lambda: context.send_initial_metadata(rpc.id_metadata),
            interrupt=rpc.interrupt,
        )
        async with aclosing(self._streams.run(completion, caller)) as answer:
            async for event in answer:
                if isinstance(event, TextDelta):
                    await context.write(wire.delta_message(event))
                else:
                    energy = wire.energy_trailers(event.energy, is_settled=event.is_settled)
                    context.set_trailing_metadata((*rpc.id_metadata, *energy))
                    await context.write(wire.final_message(event))

    def _find(self, name: str, rpc: Rpc) -> ServedModel:
        if not name:
            raise InvalidRequest(
                field="model", got="nothing", limit="a served model", fix="name one of ListModels"
            )
        model = find_model(self._models, name, rpc.identity)
        rpc.model = name
        return model

    def _describe(self, model: ServedModel) -> pb.Model:
        attached = self._pool.of_model(model.name)
        hello = attached[0].hello if attached else None
        return pb.Model(
            name=model.name,
            architecture=hello.architecture if hello else "",
            context_tokens=hello.context_tokens if hello else model.section.limits.context_tokens,
            max_output_tokens=model.bounds.max_output_tokens,
            ready_replicas=len(self._pool.ready(model.name)),
            chat=model.bounds.has_chat_template,
        )


def _draw_seed() -> int:
    return secrets.randbits(64)
