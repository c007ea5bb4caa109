"""JSON of a document, made in pieces, so that a large one holds up nobody. Pure.

The likeliest tokens beside each token of a long answer are seconds of work, and one call into the encoder
gives nobody else a turn, in whichever thread it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from secrets import token_hex
from typing import Any

ENTRIES_OF_PIECE = 8
"""With 20 likely tokens each some 0.4 ms of the event loop."""
_HOLE = token_hex(16)
"""Stands for `Entries` until they are written. Drawn, so that no caller's text is one."""


class Entries:
    """A list whose entries are made when they are written, a few at a time."""

    def __init__(self, entries: Iterable[Any]) -> None:
        self.entries = entries


def json_pieces(document: Mapping[str, Any]) -> Iterator[bytes]:
    """The document in order; one piece where it has few entries."""
    holes: list[Entries] = []

    def leave_out(value: object) -> str:
        assert isinstance(value, Entries), type(value)
        holes.append(value)
        return _HOLE

    text, *texts_behind = _encode(document, leave_out).split(f'"{_HOLE}"')
    for hole, text_behind in zip(holes, texts_behind, strict=True):
        text += "["
        left, comma = iter(hole.entries), ""
        while some := list(islice(left, ENTRIES_OF_PIECE)):
            text += comma + _encode(some)[1:-1]
            comma = ","
            if len(some) == ENTRIES_OF_PIECE:
                yield text.encode()
                text = ""
        text += "]" + text_behind
    yield text.encode()


def _encode(value: object, default: Callable[[object], str] | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=default)
