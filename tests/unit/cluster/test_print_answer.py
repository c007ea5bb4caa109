"""What `generate` and `chat` print of one answer, and of several."""

from __future__ import annotations

import json

import pytest

from cluster.commands.print_answer import print_answer
from cluster.replies import Delta, TokenLogprobs


def make_delta(
    text: str, index: int = 0, *, reason: str | None = None, logprob: float | None = None
) -> Delta:
    said = () if logprob is None else (TokenLogprobs(logprob=logprob, top=((4, -0.5),)),)
    return Delta(text=text, token_ids=(9,), finish_reason=reason, logprobs=said, index=index)


def test_the_first_choice_is_printed_as_it_comes_and_the_others_behind_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events = [make_delta("a "), make_delta("x ", 1), make_delta("b"), make_delta("y", 1)]
    assert print_answer(iter(events)) == "a b"
    assert capsys.readouterr().out == "a b\nx y\n"


def test_one_answer_as_json_stays_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    print_answer(iter([make_delta("a "), make_delta("b", reason="stop")]), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"text": "a b", "finish_reason": "stop"}


def test_choices_and_logprobs_are_in_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    events = [make_delta("a", logprob=-1.0), make_delta("x", 1, reason="length")]
    print_answer(iter(events), as_json=True)
    said = [{"token_id": 9, "logprob": -1.0, "top": [[4, -0.5]]}]
    first = {"text": "a", "finish_reason": None, "logprobs": said}
    assert json.loads(capsys.readouterr().out) == {
        **first,
        "choices": [first, {"text": "x", "finish_reason": "length"}],
    }
