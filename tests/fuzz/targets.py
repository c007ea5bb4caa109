"""What reads bytes that anybody may send: each target takes any bytes, and raises nothing but our bug.

A target parses as the product does, up to a validated request or our own error. `make fuzz` runs them with
atheris, guided by coverage; `tests/property/test_parsers.py` runs their seeds and spoilt copies of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from cluster.config import ConfigError
from cluster.config.load import parse_config, read_yaml
from cluster.foreign.json_body import Body, read_body
from cluster.oip.asks import infer_ask
from cluster.openai.asks import Ask, chat_ask, completion_ask
from cluster.openai.bodies import ChatBody, CompletionBody
from cluster.request.completion import Completion
from cluster.request.errors import InvalidRequest, ResumeRefused
from cluster.request.failover import ReplicaIdentity
from cluster.request.resume_token import ResumeSeal
from cluster.request.validation import RequestBounds, parse_chat, parse_generate
from protos import wattline_inference_pb2 as pb
from protos import wattline_ledger_pb2 as ledger
from protos import wattline_link_pb2 as link
from protos import wattline_oip_pb2 as oip
from tests.fuzz.ledger import RECORD, SUMMARY, fuzz_batch, fuzz_listed, fuzz_summary
from tests.fuzz.replica import BILLS, FROM_REPLICA, read_from_replica
from tests.fuzz.trust import (
    BASIC,
    KEY,
    KEYS,
    LOCKED_KEY,
    fuzz_certificates,
    fuzz_credential,
    fuzz_keys,
    make_pem,
)

BOUNDS = RequestBounds(max_prompt_bytes=4096, max_output_tokens=64, vocab_size=1000, has_chat_template=True)
QUESTION = b"q" * 16
IDENTITY = ReplicaIdentity(model="tiny", weights_digest="w", tokenizer_digest="t")
SEAL = ResumeSeal(b"k" * 32, clock_s=lambda: 1000.0)

BodyT = TypeVar("BodyT", bound=Body)


@dataclass(frozen=True, slots=True)
class Target:
    """`run` takes any bytes; `seeds` are good ones."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def draw_seed() -> int:
    return 7


def fuzz_message(kind: type[Message], parse: Callable[[Any], object], content: bytes) -> None:
    with suppress(DecodeError, InvalidRequest):
        parse(kind.FromString(content))


def fuzz_body(kind: type[BodyT], ask: Callable[[BodyT], Ask], content: bytes) -> None:
    with suppress(InvalidRequest):
        for completion in ask(read_body(kind, content)).completions:
            assert isinstance(completion, Completion)
            assert completion.max_tokens is None or completion.max_tokens <= BOUNDS.max_output_tokens


def fuzz_token(content: bytes) -> None:
    """Nothing but what was sealed is opened."""
    with suppress(ResumeRefused):
        claims = SEAL.open(content, question=QUESTION)
        again = SEAL.seal(claims.num_deaths, seed=claims.seed, question=QUESTION, identity=IDENTITY)
        assert content == again


def fuzz_config(content: bytes) -> None:
    with suppress(ConfigError):
        parse_config(read_yaml(content, origin="fuzz"), origin="fuzz")


SAMPLING = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "seed": 7,
    "n": 2,
    "stop": ["a", "b"],
}
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1}
LIMITS = {
    "max_tokens": 8,
    "stop_token_ids": [5],
    "ignore_eos": True,
    "logit_bias": {"7": -1.5},
    "priority": 1,
}
OPTIONS = {**SAMPLING, **PENALTIES, **LIMITS, "energy_wait_ms": 5, "user": "u", "tools": []}
COMPLETION = {"model": "tiny", "prompt": "hello", **OPTIONS, "logprobs": 2, "echo": True, "stream": True}
CHAT = {
    "model": "tiny",
    "messages": [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ],
    "stream_options": {"include_usage": True},
    "max_completion_tokens": 4,
    "logprobs": True,
    "top_logprobs": 2,
    **OPTIONS,
}
RESUMED = {"model": "tiny", "prompt": [5, 6], "resume": {"token": "aGVsbG8=", "token_ids": [7]}}
GENERATE = pb.GenerateRequest(
    model="tiny",
    text="hello",
    sampling=pb.Sampling(temperature=0.5, top_p=0.9, seed=7, logit_bias={7: -1.5}, logprobs=2, n=2),
    limits=pb.Limits(max_tokens=8, stop=["a"], stop_token_ids=[5]),
    resume=pb.Resume(token=b"t", token_ids=[5]),
    session_id="s",
)
TURNS = pb.ChatRequest(model="tiny", messages=[pb.Message(role="user", content="hello")])
TENSORS = oip.ModelInferRequest(
    model_name="tiny",
    id="1",
    parameters={"max_tokens": oip.InferParameter(int64_param=4)},
    inputs=[
        oip.InferInputTensor(name="text_input", datatype="BYTES", shape=[1]),
        oip.InferInputTensor(name="stream", datatype="BOOL", shape=[1]),
    ],
    raw_input_contents=[b"\x05\x00\x00\x00hello", b"\x01"],
)
SAMPLED = oip.ModelInferRequest(
    model_name="tiny",
    inputs=[
        oip.InferInputTensor(
            name=name,
            datatype="BYTES",
            shape=[1],
            contents=oip.InferTensorContents(bytes_contents=[content]),
        )
        for name, content in {"text_input": b"hello", "sampling_parameters": b'{"top_k": "4"}'}.items()
    ],
    outputs=[oip.InferRequestedOutputTensor(name="text_output")],
)
CONFIG = b"""
models:
  - {name: tiny, source: "null", replicas: {min: 1, max: 2}, limits: {drain_s: 8}, slo: {ttft_ms: 200}}
router: {host: 127.0.0.1, grpc_port: 0, failover: {wait_s: 1.5}, protocols: {openai: false}, processes: 2}
tenants: [{name: acme, weight: 2.0, requests_per_s: 5}]
energy: {meter: fake}
runtime_dir: /tmp/x
"""

TARGETS = {
    "generate": Target(
        partial(fuzz_message, pb.GenerateRequest, lambda one: parse_generate(one, BOUNDS, draw_seed)),
        (GENERATE.SerializeToString(),),
    ),
    "chat": Target(
        partial(fuzz_message, pb.ChatRequest, lambda one: parse_chat(one, BOUNDS, draw_seed)),
        (TURNS.SerializeToString(),),
    ),
    "oip": Target(
        partial(fuzz_message, oip.ModelInferRequest, lambda one: infer_ask(one, BOUNDS, draw_seed)),
        (TENSORS.SerializeToString(), SAMPLED.SerializeToString()),
    ),
    "link": Target(
        partial(fuzz_message, link.FromReplica, read_from_replica),
        (FROM_REPLICA.SerializeToString(), BILLS.SerializeToString()),
    ),
    "openai-completion": Target(
        partial(fuzz_body, CompletionBody, lambda body: completion_ask(body, BOUNDS, draw_seed)),
        (json.dumps(COMPLETION).encode(), json.dumps(RESUMED).encode()),
    ),
    "openai-chat": Target(
        partial(fuzz_body, ChatBody, lambda body: chat_ask(body, BOUNDS, draw_seed)),
        (json.dumps(CHAT).encode(),),
    ),
    "resume-token": Target(fuzz_token, (SEAL.seal(seed=7, question=QUESTION, identity=IDENTITY),)),
    "config": Target(fuzz_config, (CONFIG,)),
    "keys": Target(fuzz_keys, (KEYS,)),
    "credential": Target(fuzz_credential, (f"Bearer {KEY}".encode(), BASIC)),
    "certificates": Target(fuzz_certificates, (make_pem(), LOCKED_KEY)),
    "ledger-batch": Target(fuzz_batch, (RECORD.SerializeToString(),)),
    "ledger-summary": Target(fuzz_summary, (SUMMARY.SerializeToString(),)),
    "ledger-list": Target(
        fuzz_listed, (ledger.ClosedRequests(requests=RECORD.requests).SerializeToString(),)
    ),
}
