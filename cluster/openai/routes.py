"""OpenAI's addresses: models, completions, chat completions."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from time import time
from typing import Any, TypeVar

from starlette.routing import BaseRoute, Route

from cluster.foreign.json_body import read_body
from cluster.link.replica_pool import ReplicaPool
from cluster.openai.answer import Answer
from cluster.openai.asks import Ask, chat_ask, completion_ask
from cluster.openai.bodies import AnswerBody, ChatBody, CompletionBody
from cluster.openai.exchange import Exchange, ExchangeGuard
from cluster.openai.failures import plain_failure
from cluster.openai.shapes import ChatShape, CompletionShape, Shape
from cluster.request.validation import RequestBounds
from cluster.router.streams import Streams
from cluster.served_model import ServedModel, find_model
from cluster.text.text_threads import TextThreads

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
ALL_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")

AskedT = TypeVar("AskedT", bound=AnswerBody)


class OpenAIRoutes:
    """What each address does. `created` of a model is when this router began to serve it."""

    def __init__(
        self,
        *,
        guard: ExchangeGuard,
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
        self._started_s = int(time())

    def routes(self) -> tuple[BaseRoute, ...]:
        """For the router's HTTP application."""
        guard = self._guard
        one_model = f"{MODELS}/{{name:path}}"
        return (
            Route(
                COMPLETIONS, guard.endpoint(COMPLETIONS, self._complete, is_inference=True), methods=["POST"]
            ),
            Route(CHAT, guard.endpoint(CHAT, self._chat, is_inference=True), methods=["POST"]),
            Route(MODELS, guard.endpoint(MODELS, self._list_models), methods=["GET"]),
            Route(one_model, guard.endpoint(one_model, self._show_model), methods=["GET"]),
            Route("/v1/{path:path}", guard.endpoint("/v1", self._refuse_path), methods=list(ALL_METHODS)),
        )

    async def _complete(self, exchange: Exchange, content: bytes) -> None:
        await self._answer(
            exchange,
            read_body(CompletionBody, content),
            completion_ask,
            lambda ask: CompletionShape(has_logprobs=ask.num_logprobs is not None),
        )

    async def _chat(self, exchange: Exchange, content: bytes) -> None:
        await self._answer(
            exchange,
            read_body(ChatBody, content),
            chat_ask,
            lambda ask: ChatShape(has_logprobs=ask.num_logprobs is not None),
        )

    async def _answer(
        self,
        exchange: Exchange,
        body: AskedT,
        read_ask: Callable[[AskedT, RequestBounds, Callable[[], int]], Ask],
        shape_of: Callable[[Ask], Shape],
    ) -> None:
        model = find_model(self._models, body.model, exchange.identity)
        exchange.model = model.name
        ask = read_ask(body, model.bounds, _draw_seed)
        answer = Answer(
            streams=self._streams,
            threads=self._threads,
            ask=ask,
            model=model,
            shape=shape_of(ask),
            exchange=exchange,
        )
        await answer.write()

    async def _list_models(self, exchange: Exchange, _: bytes) -> None:
        models = [
            self._describe(model) for name, model in self._models.items() if exchange.identity.may_use(name)
        ]
        await exchange.reply.send_document({"object": "list", "data": models})

    async def _show_model(self, exchange: Exchange, _: bytes) -> None:
        model = find_model(self._models, exchange.request.path_params["name"], exchange.identity)
        await exchange.reply.send_document(self._describe(model))

    async def _refuse_path(self, exchange: Exchange, _: bytes) -> None:
        served = f"POST {COMPLETIONS}, POST {CHAT}, GET {MODELS}"
        failure = plain_failure(404, f"no such address or method here; served: {served}", code="NOT_FOUND")
        await exchange.reply.send_document(failure.document, status=failure.status)

    def _describe(self, model: ServedModel) -> dict[str, Any]:
        attached = self._pool.of_model(model.name)
        context = attached[0].hello.context_tokens if attached else model.section.limits.context_tokens
        return {
            "id": model.name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "wattline",
            "max_model_len": context or None,
            "ready_replicas": len(self._pool.ready(model.name)),
        }


def _draw_seed() -> int:
    return secrets.randbits(63)
