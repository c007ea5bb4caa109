"""JSON bodies of foreign protocols: types are checked here, values by `validation.py`.

A field that is not served is refused unless it asks for nothing, and so is one that is not known: an answer
that silently lacks what was asked for is worse than none. Only labels that change no answer are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.request.errors import InvalidRequest

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

BodyT = TypeVar("BodyT", bound="Body")


class Body(BaseModel):
    """JSON types as they are: no number for a text, no text for a number."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


def read_body(kind: type[BodyT], content: bytes, *, strict: bool = True) -> BodyT:
    """The body of a request. Raises InvalidRequest, which names the field.

    `strict` False: numbers may be written as texts.
    """
    try:
        body = kind.model_validate_json(content, strict=strict)
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
    """The first thing that is wrong, or what is too long. No value of the request is in it: a prompt may be.

    A union tells of each of its kinds, and that a long list is no text says nothing.
    """
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    problem: dict[str, Any] = dict(next((one for one in problems if one["type"] == "too_long"), problems[0]))
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
