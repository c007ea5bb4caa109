"""Bodies of foreign protocols are read no further than they may be wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.foreign.json_body import read_body
from cluster.foreign.sampling_body import MAX_ENTRIES
from cluster.openai.bodies import AnswerBody, ChatBody, CompletionBody
from cluster.request.errors import InvalidRequest

MANY = MAX_ENTRIES + 1
PARTS = [{"type": "text", "text": "a"}] * MANY


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (CompletionBody, "prompt", ["a"] * MANY),
        (CompletionBody, "prompt", [[1]] * MANY),
        (CompletionBody, "stop", ["a"] * MANY),
        (CompletionBody, "logit_bias", {str(token_id): 1 for token_id in range(MANY)}),
        (ChatBody, "messages", [{"role": "user", "content": "a"}] * MANY),
        (ChatBody, "messages", [{"role": "user", "content": PARTS}]),
    ],
)
def test_what_has_too_many_entries_is_refused_before_it_is_read_to_its_end(
    kind: type[AnswerBody], field: str, value: Any
) -> None:
    body = {"model": "m", "prompt": "a", "messages": [], field: value}
    with pytest.raises(InvalidRequest, match=f"^{field}.* at most {MAX_ENTRIES} items"):
        read_body(kind, json.dumps(body).encode())
