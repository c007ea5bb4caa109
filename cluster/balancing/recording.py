"""A decision of the balancer as a document: written down, read back, and taken again. Pure.

`wattline why ID --record FILE` writes one; a test reads it and asks `replay` whether the balancer of this
release still chooses the same. It holds loads, rates and scores of lanes, and no text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, TypeVar

from cluster.balancing.balancer import choose
from cluster.balancing.decision import Candidate, Choice, Policy, Question, Reason, Score, Target
from cluster.balancing.lane_view import LaneView

FORMAT = "wattline-decisions/1"
MAX_DECISIONS = 4096
"""In one document."""

Flat = TypeVar("Flat", LaneView, Target, Score)
Word = TypeVar("Word", bound=StrEnum)


class BadRecording(ValueError):
    """A document that is none of ours, or was changed by hand; the text says where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedDecision:
    """What was asked, and what was answered."""

    question: Question
    choice: Choice


def replay(recorded: RecordedDecision) -> Choice | None:
    """What the balancer answers today. Equal to `recorded.choice` unless its rules have changed."""
    return choose(recorded.question)


def write_decisions(decisions: Sequence[RecordedDecision]) -> str:
    """One JSON document, readable by people too."""
    document = {"format": FORMAT, "decisions": [asdict(decision) for decision in decisions]}
    return json.dumps(document, indent=1)


def read_decisions(text: str) -> tuple[RecordedDecision, ...]:
    """The decisions of a document, in its order. Raises BadRecording."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecording(f"the recording is no JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadRecording(f"the recording's format is not {FORMAT}; write it with `wattline why --record`")
    entries = _sequence(document, "decisions")
    if len(entries) > MAX_DECISIONS:
        raise BadRecording(f"{len(entries)} decisions, limit {MAX_DECISIONS}; split the file")
    return tuple([_decision(entry, f"decisions[{index}]") for index, entry in enumerate(entries)])


def _decision(entry: Any, where: str) -> RecordedDecision:
    _check_keys(entry, {"question", "choice"}, where)
    question = _question(entry["question"], f"{where}.question")
    choice = _choice(entry["choice"], f"{where}.choice")
    if not 0 <= choice.index < len(question.candidates) == len(choice.scores):
        raise BadRecording(
            f"{where}.choice does not fit its question's {len(question.candidates)} candidates"
        )
    return RecordedDecision(question=question, choice=choice)


def _question(entry: Any, where: str) -> Question:
    _check_keys(entry, {field.name for field in fields(Question)}, where)
    return Question(
        policy=_word(Policy, entry["policy"], f"{where}.policy"),
        target=_flat(Target, entry["target"], f"{where}.target"),
        prompt_tokens=_count(entry, "prompt_tokens", where),
        output_tokens=_count(entry, "output_tokens", where),
        candidates=tuple(
            [
                _candidate(candidate, f"{where}.candidates[{index}]")
                for index, candidate in enumerate(_sequence(entry, "candidates"))
            ]
        ),
        draw=_count(entry, "draw", where),
        turn=_count(entry, "turn", where),
    )


def _candidate(entry: Any, where: str) -> Candidate:
    _check_keys(entry, {field.name for field in fields(Candidate)}, where)
    if not isinstance(entry["is_session"], bool):
        raise BadRecording(f"{where}.is_session is neither true nor false")
    lane = _flat(LaneView, entry["lane"], f"{where}.lane")
    if lane.max_sequences < 1:
        raise BadRecording(f"{where}.lane.max_sequences={lane.max_sequences}, at least 1")
    return Candidate(
        lane=lane,
        cached_tokens=_count(entry, "cached_tokens", where),
        is_session=entry["is_session"],
    )


def _choice(entry: Any, where: str) -> Choice:
    _check_keys(entry, {field.name for field in fields(Choice)}, where)
    return Choice(
        index=_count(entry, "index", where),
        reason=_word(Reason, entry["reason"], f"{where}.reason"),
        scores=tuple(
            [
                _flat(Score, score, f"{where}.scores[{index}]")
                for index, score in enumerate(_sequence(entry, "scores"))
            ]
        ),
    )


KINDS: Mapping[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
"""By how a field is annotated: annotations are text in this house."""


def _flat(kind: type[Flat], entry: Any, where: str) -> Flat:
    """A dataclass of numbers, names and truths."""
    _check_keys(entry, {field.name for field in fields(kind)}, where)
    values: dict[str, Any] = {}
    for field in fields(kind):
        wanted, value = KINDS[str(field.type)], entry[field.name]
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise BadRecording(f"{where}.{field.name}={value!r} is no {wanted.__name__}")
        values[field.name] = value
    return kind(**values)


def _word(kind: type[Word], value: Any, where: str) -> Word:
    try:
        return kind(value)
    except ValueError:
        raise BadRecording(f"{where}={value!r} is none of {', '.join(kind)}") from None


def _count(entry: Mapping[str, Any], key: str, where: str) -> int:
    value = entry[key]
    if type(value) is not int or value < 0:
        raise BadRecording(f"{where}.{key}={value!r} is no count")
    return value


def _sequence(entry: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = entry.get(key)
    if not isinstance(value, list):
        raise BadRecording(f"{key} is no list")
    return value


def _check_keys(entry: Any, wanted: set[str], where: str) -> None:
    if not isinstance(entry, dict) or set(entry) != wanted:
        raise BadRecording(f"{where} does not have exactly the fields {', '.join(sorted(wanted))}")
