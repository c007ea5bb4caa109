"""Validation: protobuf requests in, `Completion` out, or `InvalidRequest` with field, value, limit and fix.

Pure. What the server does not serve is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.request.completion import ChatPrompt, Completion, Prompt, Resume, TextPrompt, TokenPrompt, Turn
from cluster.request.errors import InvalidRequest
from protos import wattline_inference_pb2 as pb
from replicas.engine.request_check import (
    MAX_BIASED_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MIN_REPETITION_PENALTY,
)
from replicas.request import SamplingParams

ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 1024
MAX_STOP_TEXTS = 16
MAX_STOP_TEXT_BYTES = 64
MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 2**31 - 1
MAX_PRIORITY = 100
MAX_ENERGY_WAIT_MS = 1000
MAX_SESSION_ID_BYTES = 128
MAX_RESUME_TOKEN_BYTES = 256
MAX_CHOICES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBounds:
    """What one model lets a request ask for."""

    max_prompt_bytes: int
    max_output_tokens: int
    vocab_size: int
    has_chat_template: bool


def parse_generate(
    request: pb.GenerateRequest, bounds: RequestBounds, draw_seed: Callable[[], int]
) -> Completion:
    """A validated completion request."""
    prompt: Prompt
    kind = request.WhichOneof("prompt")
    if kind == "text":
        prompt = parse_text(request.text, bounds, field="prompt.text")
    elif kind == "tokens":
        prompt = TokenPrompt(ids=parse_token_ids(request.tokens.ids, bounds, field="prompt.tokens.ids"))
    else:
        raise InvalidRequest(field="prompt", got="nothing", limit="text or tokens", fix="set one of them")
    return _completion(request, prompt, bounds, draw_seed)


def parse_chat(request: pb.ChatRequest, bounds: RequestBounds, draw_seed: Callable[[], int]) -> Completion:
    """A validated chat request."""
    return _completion(request, parse_turns(request.messages, bounds), bounds, draw_seed)


def parse_text(text: str, bounds: RequestBounds, *, field: str) -> TextPrompt:
    """A prompt that is not empty and not over the byte cap, which holds before any tokenising."""
    if not text:
        raise InvalidRequest(field=field, got="an empty prompt", limit="1 byte or more", fix="send some text")
    _check_bytes(len(text.encode()), bounds, field=field)
    return TextPrompt(text=text)


def parse_token_ids(ids: Sequence[int], bounds: RequestBounds, *, field: str) -> tuple[int, ...]:
    """Token ids of this model's vocabulary, at least one."""
    if not ids:
        raise InvalidRequest(field=field, got="no tokens", limit="1 token or more", fix="send some tokens")
    _check_bytes(4 * len(ids), bounds, field=field)
    _check_vocabulary(ids, bounds, field=field)
    return tuple(ids)


def parse_turns(messages: Sequence[pb.Message], bounds: RequestBounds) -> ChatPrompt:
    """A conversation in known roles; a single message may be empty, but not all of them."""
    if not bounds.has_chat_template:
        raise InvalidRequest(
            field="model", got="one without a chat template", limit="a chat model", fix="use Generate"
        )
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(
            field="messages",
            got=f"{len(messages)} messages",
            limit=f"1 to {MAX_MESSAGES}",
            fix="send at least one" if not messages else "shorten the conversation",
        )
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                field=f"messages[{index}].role",
                got=repr(message.role[:32]),
                limit=", ".join(ROLES),
                fix="use one of these roles",
            )
    size_bytes = sum(len(message.content.encode()) for message in messages)
    if size_bytes == 0:
        raise InvalidRequest(
            field="messages", got="only empty messages", limit="1 byte or more", fix="send some text"
        )
    _check_bytes(size_bytes, bounds, field="messages")
    return ChatPrompt(turns=tuple(Turn(role=message.role, content=message.content) for message in messages))


def parse_session_id(session_id: str) -> str:
    """Any short text; a router keeps none of it."""
    size_bytes = len(session_id.encode())
    if size_bytes > MAX_SESSION_ID_BYTES:
        raise InvalidRequest(
            field="session_id",
            got=f"{size_bytes} bytes",
            limit=f"{MAX_SESSION_ID_BYTES} bytes",
            fix="use a shorter id",
        )
    return session_id


def output_tokens_allowed(
    completion: Completion, *, prompt_tokens: int, context_tokens: int, max_output: int
) -> int:
    """Tokens this request may produce, once the prompt's length is known."""
    if prompt_tokens == 0:
        raise InvalidRequest(field="prompt", got="no tokens", limit="1 token or more", fix="send some text")
    if prompt_tokens + 1 > context_tokens:
        raise InvalidRequest(
            field="prompt",
            got=f"{prompt_tokens} tokens",
            limit=f"{context_tokens - 1} tokens, one less than the model's context",
            fix="shorten the prompt",
        )
    wanted = max_output if completion.max_tokens is None else completion.max_tokens
    return min(wanted, context_tokens - prompt_tokens)


def _completion(
    request: pb.GenerateRequest | pb.ChatRequest,
    prompt: Prompt,
    bounds: RequestBounds,
    draw_seed: Callable[[], int],
) -> Completion:
    _check_range("priority", request.priority, low=-MAX_PRIORITY, high=MAX_PRIORITY)
    energy_wait_ms = request.energy_wait_ms if request.HasField("energy_wait_ms") else None
    if energy_wait_ms is not None:
        _check_range("energy_wait_ms", energy_wait_ms, low=0, high=MAX_ENERGY_WAIT_MS)
    limits = request.limits
    return Completion(
        model=request.model,
        prompt=prompt,
        sampling=_parse_sampling(request.sampling, bounds, draw_seed),
        max_tokens=_parse_max_tokens(limits, bounds),
        stop_texts=_parse_stop_texts(limits.stop),
        stop_token_ids=_parse_stop_token_ids(limits.stop_token_ids, bounds),
        ignore_eos=limits.ignore_eos,
        priority=request.priority,
        energy_wait_ms=energy_wait_ms,
        session_id=parse_session_id(request.session_id),
        resume=_parse_resume(request, bounds),
        num_choices=_parse_num_choices(request.sampling),
    )


def _parse_num_choices(sampling: pb.Sampling) -> int:
    if not sampling.HasField("n"):
        return 1
    _check_range("sampling.n", sampling.n, low=1, high=MAX_CHOICES)
    return sampling.n


def _parse_resume(request: pb.GenerateRequest | pb.ChatRequest, bounds: RequestBounds) -> Resume | None:
    if not request.HasField("resume"):
        return None
    if request.sampling.n > 1:
        raise InvalidRequest(
            field="resume", got=f"{request.sampling.n} choices", limit="1 choice", fix="start over"
        )
    token, ids = request.resume.token, request.resume.token_ids
    _check_range("resume.token", len(token), low=1, high=MAX_RESUME_TOKEN_BYTES)
    _check_range("resume.token_ids", len(ids), low=0, high=bounds.max_output_tokens)
    _check_vocabulary(ids, bounds, field="resume.token_ids")
    return Resume(token=token, token_ids=tuple(ids))


def _parse_sampling(
    sampling: pb.Sampling, bounds: RequestBounds, draw_seed: Callable[[], int]
) -> SamplingParams:
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    if not 0.0 <= temperature <= MAX_TEMPERATURE:  # Not-a-number fails both comparisons.
        raise InvalidRequest(
            field="sampling.temperature",
            got=temperature,
            limit=f"0 to {MAX_TEMPERATURE}",
            fix="use 0 for greedy",
        )
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0 or math.isnan(top_p):
        raise InvalidRequest(
            field="sampling.top_p", got=top_p, limit="above 0, up to 1", fix="use 1 for all tokens"
        )
    _check_range("sampling.top_k", sampling.top_k, low=0, high=MAX_TOP_K)
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=sampling.top_k,
        seed=sampling.seed if sampling.HasField("seed") else draw_seed(),
        min_p=_parse_number(sampling, "min_p", default=0.0, low=0.0, high=1.0),
        repetition_penalty=_parse_number(
            sampling,
            "repetition_penalty",
            default=1.0,
            low=MIN_REPETITION_PENALTY,
            high=MAX_REPETITION_PENALTY,
        ),
        presence_penalty=_parse_number(
            sampling, "presence_penalty", default=0.0, low=-MAX_PENALTY, high=MAX_PENALTY
        ),
        frequency_penalty=_parse_number(
            sampling, "frequency_penalty", default=0.0, low=-MAX_PENALTY, high=MAX_PENALTY
        ),
        logit_bias=_parse_logit_bias(sampling.logit_bias, bounds),
        num_logprobs=_parse_logprobs(sampling, bounds),
    )


def _parse_number(
    sampling: pb.Sampling,
    name: Literal["min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"],
    *,
    default: float,
    low: float,
    high: float,
) -> float:
    value: float = getattr(sampling, name) if sampling.HasField(name) else default
    if not low <= value <= high:  # Not-a-number fails both comparisons.
        raise InvalidRequest(
            field=f"sampling.{name}", got=value, limit=f"{low} to {high}", fix=f"use {default} for no effect"
        )
    return value


def _parse_logprobs(sampling: pb.Sampling, bounds: RequestBounds) -> int | None:
    if not sampling.HasField("logprobs"):
        return None
    high = min(MAX_LOGPROBS, bounds.vocab_size)
    _check_range("sampling.logprobs", sampling.logprobs, low=0, high=high)
    return sampling.logprobs


def _parse_logit_bias(
    logit_bias: Mapping[int, float], bounds: RequestBounds
) -> tuple[tuple[int, float], ...]:
    field = "sampling.logit_bias"
    if len(logit_bias) > MAX_BIASED_TOKENS:
        raise InvalidRequest(
            field=field,
            got=f"{len(logit_bias)} tokens",
            limit=f"{MAX_BIASED_TOKENS} tokens",
            fix="send fewer",
        )
    _check_vocabulary(logit_bias, bounds, field=field)
    for token_id, bias in logit_bias.items():
        if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            raise InvalidRequest(
                field=f"{field}[{token_id}]",
                got=bias,
                limit=f"{-MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}",
                fix="choose a value in this range",
            )
    return tuple(sorted(logit_bias.items()))


def _parse_max_tokens(limits: pb.Limits, bounds: RequestBounds) -> int | None:
    if not limits.HasField("max_tokens"):
        return None
    _check_range("limits.max_tokens", limits.max_tokens, low=1, high=bounds.max_output_tokens)
    return limits.max_tokens


def _parse_stop_texts(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOP_TEXTS:
        raise InvalidRequest(
            field="limits.stop", got=f"{len(stops)} texts", limit=f"{MAX_STOP_TEXTS} texts", fix="send fewer"
        )
    for index, stop in enumerate(stops):
        size_bytes = len(stop.encode())
        if not 1 <= size_bytes <= MAX_STOP_TEXT_BYTES:
            raise InvalidRequest(
                field=f"limits.stop[{index}]",
                got=f"{size_bytes} bytes",
                limit=f"1 to {MAX_STOP_TEXT_BYTES} bytes",
                fix="remove it" if size_bytes == 0 else "shorten it",
            )
    return tuple(stops)


def _parse_stop_token_ids(ids: Sequence[int], bounds: RequestBounds) -> frozenset[int]:
    field = "limits.stop_token_ids"
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            field=field, got=f"{len(ids)} ids", limit=f"{MAX_STOP_TOKEN_IDS} ids", fix="send fewer"
        )
    _check_vocabulary(ids, bounds, field=field)
    return frozenset(ids)


def _check_bytes(size_bytes: int, bounds: RequestBounds, *, field: str) -> None:
    if size_bytes > bounds.max_prompt_bytes:
        raise InvalidRequest(
            field=field,
            got=f"{size_bytes} bytes",
            limit=f"{bounds.max_prompt_bytes} bytes",
            fix="shorten the prompt",
        )


def _check_vocabulary(ids: Iterable[int], bounds: RequestBounds, *, field: str) -> None:
    highest = max(ids, default=0)
    if highest >= bounds.vocab_size:
        raise InvalidRequest(
            field=field,
            got=f"token {highest}",
            limit=f"0 to {bounds.vocab_size - 1}",
            fix="use the tokens of this model",
        )


def _check_range(field: str, value: int, *, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(
            field=field, got=value, limit=f"{low} to {high}", fix="choose a value in this range"
        )
