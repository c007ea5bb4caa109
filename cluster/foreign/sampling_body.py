"""Sampling options as JSON, by the names that OpenAI and vLLM share, and as our own messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

from pydantic import Field

from cluster.foreign.json_body import Body
from cluster.request.completion import Completion
from cluster.request.errors import InvalidRequest
from protos import wattline_inference_pb2 as pb

UINT64 = 2**64
UINT32_DIGITS = 10
ALL_TOKENS = -1
"""Of `top_k`, in vLLM's words."""
THEIR_NAMES = {"prompt.text": "prompt", "prompt.tokens.ids": "prompt"}
PREFIXES = ("sampling.", "limits.")
"""Of our fields; these protocols have flat names."""

Uint32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
TokenIds = Annotated[list[Uint32], Field(fail_fast=True)]
MAX_ENTRIES = 2048
"""Of what may have many; what each may have is said by `validation.py`, in better words."""
EntryT = TypeVar("EntryT")
Few = Annotated[list[EntryT], Field(max_length=MAX_ENTRIES, fail_fast=True)]
"""A list that is read no further than it may be wrong: 170,000 messages took 1.7 s of the event loop."""


class SamplingBody(Body):
    """How answers are drawn and where they end."""

    max_tokens: Uint32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=ALL_TOKENS, le=2**32 - 1)] | None = None
    min_p: float | None = None
    n: Uint32 | None = None
    best_of: Uint32 | None = None
    stop: str | Few[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    seed: Int64 | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_ENTRIES)] | None = None
    priority: Int32 | None = None
    energy_wait_ms: Uint32 | None = None


def seed_of(body: SamplingBody, draw_seed: Callable[[], int]) -> int:
    """A negative seed is one too."""
    return draw_seed() if body.seed is None else body.seed % UINT64


def check_best_of(body: SamplingBody) -> None:
    """Raises InvalidRequest where more answers would be drawn than given."""
    if body.best_of not in (None, 1, body.n):
        raise InvalidRequest(
            field="best_of", got=body.best_of, limit="1, or the value of n", fix="leave it out"
        )


def generate_request(
    model: str, body: SamplingBody, *, max_tokens: int | None, seed: int
) -> pb.GenerateRequest:
    """Our own message, all but the prompt."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    return pb.GenerateRequest(
        model=model,
        sampling=pb.Sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=None if body.top_k == ALL_TOKENS else body.top_k,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=_logit_bias(body.logit_bias or {}),
            n=body.n,
            seed=seed,
        ),
        limits=pb.Limits(
            max_tokens=max_tokens,
            stop=stop,
            stop_token_ids=body.stop_token_ids,
            ignore_eos=body.ignore_eos or False,
        ),
        priority=body.priority or 0,
        energy_wait_ms=body.energy_wait_ms,
    )


def _logit_bias(biases: dict[str, float]) -> dict[int, float]:
    """Its keys are token ids as texts."""
    for key in biases:
        # Python converts no more than some thousand digits.
        if not (key.isascii() and key.isdecimal() and len(key) <= UINT32_DIGITS and int(key) < 2**32):
            raise InvalidRequest(
                field="logit_bias", got="a key that is no token id", limit="0 or more", fix="use token ids"
            )
    return {int(key): bias for key, bias in biases.items()}


def in_their_words(parse: Callable[[], Completion], *, prompt: str) -> Completion:
    """Our validation with this protocol's names of fields."""
    try:
        return parse()
    except InvalidRequest as error:
        name = THEIR_NAMES.get(error.field, error.field)
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        raise error.renamed(prompt if name == "prompt" else name) from None
