"""A real router in the test's own event loop, on free ports, with models that need no files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.addresses import RouterAddresses
from cluster.config import Config, parse_config
from cluster.edge.process import Router
from cluster.text.null_tokenizer import NullTokenizer
from protos import wattline_cluster_pb2_grpc as cluster_grpc
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as inference_grpc
from tests.fake_replica import FakeReplica, Tokens

MODEL = "tiny"
VOCAB_SIZE = 1000


def make_config(
    *, model: dict[str, Any] | None = None, router: dict[str, Any] | None = None, **rest: Any
) -> Config:
    """One null model on free ports; the arguments override keys of its sections.

    Requests are spread over the replicas: tests that want them packed say so.
    """
    section = {
        "name": MODEL,
        "source": "null",
        "null_engine": {"vocab_size": VOCAB_SIZE},
        "balancing": "least_loaded",
        **(model or {}),
    }
    ports = {"grpc_port": 0, "http_port": 0, "link_port": 0, **(router or {})}
    return parse_config({"models": [section, {"name": "absent", "source": "null"}], "router": ports, **rest})


@dataclass(frozen=True, slots=True, kw_only=True)
class TestRouter:
    """A running router and a client's way in."""

    __test__ = False

    router: Router
    addresses: RouterAddresses
    channel: grpc.aio.Channel
    inference: inference_grpc.InferenceAsyncStub
    cluster: cluster_grpc.ClusterAsyncStub

    @property
    def num_queued(self) -> int:
        """Requests for the first model that wait for a place."""
        return len(self.router._streams._gates[MODEL])

    def replica(self, **fields: Any) -> FakeReplica:
        """A replica of the first model, not attached yet."""
        return FakeReplica(
            address=self.addresses.link, **{"model": MODEL, "vocab_size": VOCAB_SIZE, **fields}
        )


@asynccontextmanager
async def run_test_router(config: Config | None = None) -> AsyncIterator[TestRouter]:
    config = config or make_config()
    router = Router(
        config,
        tokenizers={model.name: NullTokenizer(model.null_engine.vocab_size) for model in config.models},
    )
    try:
        addresses = await router.start()
        async with grpc.aio.insecure_channel(addresses.grpc) as channel:
            yield TestRouter(
                router=router,
                addresses=addresses,
                channel=channel,
                inference=inference_grpc.InferenceStub(channel),
                cluster=cluster_grpc.ClusterStub(channel),
            )
    finally:
        await router.stop(drain_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All a caller got."""

    text: str
    token_ids: list[int]
    deltas: list[pb.Delta]
    final: pb.Final
    trailers: dict[str, str]
    headers: dict[str, str]


async def collect(
    call: grpc.aio.UnaryStreamCall[Any, pb.GenerateResponse], *begun: pb.GenerateResponse
) -> Answer:
    """Read an answer, of which `begun` was read. Asserts that it is deltas, then just one final message."""
    messages = [*begun, *[message async for message in call]]
    assert [message.WhichOneof("event") for message in messages] == ["delta"] * (len(messages) - 1) + [
        "final"
    ]
    deltas = [message.delta for message in messages[:-1]]
    assert all(not delta.finish_reason for delta in deltas[:-1])
    assert deltas[-1].finish_reason
    return Answer(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        deltas=deltas,
        final=messages[-1].final,
        trailers=_texts(await call.trailing_metadata()),
        headers=_texts(await call.initial_metadata()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of several answers to a prompt."""

    text: str
    token_ids: list[int]
    finish_reason: pb.FinishReason.ValueType


async def collect_choices(
    call: grpc.aio.UnaryStreamCall[Any, pb.GenerateResponse],
) -> tuple[list[Choice], pb.Final]:
    """Read all choices, in the order of their index. Asserts that each ends once, and one final is last."""
    messages = [message async for message in call]
    deltas = [message.delta for message in messages[:-1] if message.WhichOneof("event") == "delta"]
    assert len(deltas) == len(messages) - 1 and messages[-1].WhichOneof("event") == "final"
    choices = []
    for index in range(max(delta.index for delta in deltas) + 1):
        own = [delta for delta in deltas if delta.index == index]
        assert [bool(delta.finish_reason) for delta in own] == [False] * (len(own) - 1) + [True]
        choices.append(
            Choice(
                text="".join(delta.text for delta in own),
                token_ids=[token_id for delta in own for token_id in delta.token_ids],
                finish_reason=own[-1].finish_reason,
            )
        )
    return choices, messages[-1].final


def make_request(text: str = "hello", **fields: Any) -> pb.GenerateRequest:
    """A greedy request for eight tokens; `max_tokens`, `stop` and the like go to their own messages."""
    limits = {
        key: fields.pop(key)
        for key in ("max_tokens", "stop", "stop_token_ids", "ignore_eos")
        if key in fields
    }
    return pb.GenerateRequest(
        **{
            "model": MODEL,
            "text": text,
            "sampling": pb.Sampling(temperature=0.0),
            "limits": pb.Limits(**{"max_tokens": 8, **limits}),
            **fields,
        }
    )


def decode(token_ids: Sequence[int]) -> str:
    """The text that the test model's tokens stand for."""
    return NullTokenizer(VOCAB_SIZE).decode(token_ids)


def script(*token_ids: int) -> Tokens:
    """Tokens of an answer, the last one for ever."""
    return lambda _, pos: token_ids[min(pos, len(token_ids) - 1)]


def spell(text: str) -> tuple[int, ...]:
    """Tokens that stand for `text`."""
    return NullTokenizer(VOCAB_SIZE).encode(text)


async def fail(call: Any) -> grpc.aio.AioRpcError:
    """The error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return caught.value


def error_details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The google.rpc messages of an error, by type name."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    found: dict[str, Any] = {}
    for detail in status.details:
        kind = getattr(error_details_pb2, detail.type_url.rpartition(".")[2])
        found[kind.DESCRIPTOR.name] = kind.FromString(detail.value)
    return found


def _texts(metadata: grpc.aio.Metadata) -> dict[str, str]:
    return {key: value for key, value in metadata if isinstance(value, str)}
