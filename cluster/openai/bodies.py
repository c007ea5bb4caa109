"""Bodies of OpenAI requests as their clients send them. Types are checked here, values by `validation.py`.

A field that is not served is refused unless it asks for nothing, and so is one that is not known: an answer
that silently lacks what was asked for is worse than none. Only labels that change no answer are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.router.errors import InvalidRequest

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""They label a request, or say how it is filed; no answer depends on them."""
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "include_obfuscation": (True, False),
    "name": (),
    "tool_calls": ([],),
    "image_url": (),
    "input_audio": (),
    "file": (),
}
"""Fields of this protocol and its extensions that are not served, and what in them asks for nothing."""

Uint32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
TokenIds = list[Uint32]

BodyT = TypeVar("BodyT", bound="Body")


class Body(BaseModel):
    """JSON types as they are: no number for a text, no text for a number."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class AnswerBody(Body):
    """What both kinds of request have. The last seven fields are common extensions."""

    model: str
    max_tokens: Uint32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Uint32 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: Int64 | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: Uint32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    priority: Int32 | None = None
    energy_wait_ms: Uint32 | None = None


class CompletionBody(AnswerBody):
    """`POST /v1/completions`."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    echo: bool | None = None
    logprobs: Uint32 | None = None
    best_of: Uint32 | None = None


class ContentPart(Body):
    """A piece of a message; only text is served."""

    type: str
    text: str | None = None


class MessageBody(Body):
    role: str
    content: str | list[ContentPart] | None = None


class ChatBody(AnswerBody):
    """`POST /v1/chat/completions`."""

    messages: list[MessageBody]
    max_completion_tokens: Uint32 | None = None
    logprobs: bool | None = None
    top_logprobs: Uint32 | None = None


def read_body(kind: type[BodyT], content: bytes) -> BodyT:
    """The body of a request. Raises InvalidRequest, which names the field."""
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        raise _refusal(error) from None
    refuse_extras(body)
    return body


def refuse_extras(body: Body, *, inside: str = "") -> None:
    """Raises InvalidRequest for a field that is not served, here or in what the body holds."""
    for name, value in (body.model_extra or {}).items():
        if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
            continue
        limit = "it is not served here" if name in NEUTRAL else "no field of this name"
        raise InvalidRequest(field=inside + name[:64], got="a value", limit=limit, fix="leave it out")
    for name in type(body).model_fields:
        _refuse_inside(getattr(body, name), f"{inside}{name}")


def _refuse_inside(value: object, name: str) -> None:
    if isinstance(value, Body):
        refuse_extras(value, inside=f"{name}.")
    elif isinstance(value, list) and value and isinstance(value[0], Body):
        for index, entry in enumerate(value):
            _refuse_inside(entry, f"{name}[{index}]")


def _refusal(error: ValidationError) -> InvalidRequest:
    """The first thing that is wrong. No value of the request is in it: it may be the prompt."""
    problem: dict[str, Any] = dict(
        error.errors(include_url=False, include_input=False, include_context=False)[0]
    )
    if problem["type"] == "json_invalid":
        return InvalidRequest(field="body", got="no valid JSON", limit="a JSON object", fix="send one")
    names = [str(part) for part in problem["loc"] if not _is_branch(part)]
    return InvalidRequest(
        field=".".join(names)[:200] or "body",
        got="nothing" if problem["type"] == "missing" else "another type or range",
        limit=str(problem["msg"])[:200],
        fix="change it",
    )


def _is_branch(part: object) -> bool:
    """Pydantic also says which branch of a union it tried, e.g. `list[str]`."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)
