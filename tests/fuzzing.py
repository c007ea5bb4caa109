"""Messages and bodies nobody means: made from their descriptors, or real ones with parts changed."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

MAX_DEPTH = 4
MAX_REPEATED = 3
MAX_MUTATIONS = 4

M = TypeVar("M", bound=Message)
Draw = st.DrawFn

TEXTS = st.one_of(
    st.sampled_from(
        ["", "tiny", "absent", "user", "assistant", "hello", "\x00", "\u202e\U0001f9a5", "x" * 300]
    ),
    st.text(max_size=8),
)
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan")]),
    st.floats(width=32),
)


def integers(low: int, high: int) -> st.SearchStrategy[int]:
    edges = [value for value in (0, 1, 2, 16, 300, low, high, high - 1) if low <= value <= high]
    return st.one_of(st.sampled_from(edges), st.integers(low, high))


VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_FLOAT: FLOATS,
    FieldDescriptor.CPPTYPE_DOUBLE: FLOATS,
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
}


@st.composite
def messages(draw: Draw, kind: type[M]) -> M:
    """Any message of this type: any fields, any values, edges often."""
    message = kind()
    _fill(draw, message, MAX_DEPTH)
    return message


@st.composite
def changed(draw: Draw, base: M) -> M:
    """The message `base` with some of its fields drawn anew: often still a good one, but for one thing."""
    message = type(base)()
    message.CopyFrom(base)
    fields = [field for field in _fields(message) if not _is_map(field)]
    for field in draw(st.lists(st.sampled_from(fields), max_size=2)) if fields else ():
        message.ClearField(field.name)
        _fill_field(draw, message, field, MAX_DEPTH - 1)
    return message


def mutated(base: st.SearchStrategy[Message]) -> st.SearchStrategy[bytes]:
    """The bytes of a message, spoilt."""
    return spoilt(base.map(lambda message: message.SerializeToString()))


@st.composite
def spoilt(draw: Draw, base: st.SearchStrategy[bytes]) -> bytes:
    """Bytes, some of them flipped, cut out, doubled or put in."""
    content = bytearray(draw(base))
    for _ in range(draw(st.integers(1, MAX_MUTATIONS))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["flip", "cut", "double", "insert", "end"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at : at + draw(st.integers(1, 8))]
            case "double":
                content[at:at] = content[max(0, at - 8) : at]
            case "end":
                del content[at:]
            case _:
                content[at:at] = draw(st.binary(max_size=8))
    return bytes(content)


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        integers(-(2**63), 2**64),
        FLOATS.filter(isfinite),
        TEXTS,
        st.sampled_from([10**30, "9" * 5000, "-1", "1.5", "7"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=MAX_REPEATED),
        st.dictionaries(
            st.one_of(TEXTS, st.sampled_from(["7", "type", "text"])), inner, max_size=MAX_REPEATED
        ),
    ),
    max_leaves=6,
)


@st.composite
def changed_json(draw: Draw, base: dict[str, Any]) -> bytes:
    """A JSON body with a few of its fields drawn anew, left out, or added."""
    body = dict(base)
    for name in draw(st.lists(st.sampled_from([*base, "suffix", "echo", "unknown"]), max_size=3)):
        if draw(st.booleans()):
            body[name] = draw(JSON_VALUES)
        else:
            body.pop(name, None)
    return json.dumps(body).encode()


def _fill(draw: Draw, message: Message, depth: int) -> None:
    fields = _fields(message)
    if not fields:
        return
    for field in draw(st.lists(st.sampled_from(fields), max_size=6, unique_by=lambda field: field.number)):
        _fill_field(draw, message, field, depth)


def _fill_field(draw: Draw, message: Message, field: FieldDescriptor, depth: int) -> None:
    if _is_map(field):
        entry: Any = field.message_type
        target = getattr(message, field.name)
        for _ in range(draw(st.integers(0, MAX_REPEATED))):
            key, value = (_value(draw, entry.fields_by_name[name], 1) for name in ("key", "value"))
            if isinstance(value, Message):
                target[key].CopyFrom(value)
            else:
                target[key] = value
        return
    if field.is_repeated:
        values = [_value(draw, field, depth) for _ in range(draw(st.integers(0, MAX_REPEATED)))]
        getattr(message, field.name).extend(value for value in values if value is not None)
        return
    value = _value(draw, field, depth)
    if value is None:
        return
    if field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def _value(draw: Draw, field: FieldDescriptor, depth: int) -> Any:
    """None: the message would nest too deep."""
    if field.message_type is not None:
        if depth == 0:
            return None
        message = GetMessageClass(field.message_type)()
        _fill(draw, message, depth - 1)
        return message
    if field.enum_type is not None:
        return draw(st.sampled_from([value.number for value in cast(Any, field.enum_type).values]))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draw(st.binary(max_size=16))
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return draw(TEXTS)
    return draw(VALUES[field.cpp_type])


def _fields(message: Message) -> list[FieldDescriptor]:
    return list(cast(Any, message.DESCRIPTOR.fields))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry
