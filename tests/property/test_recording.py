"""A recorded decision survives its document, and the balancer takes it again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.balancing.balancer import choose
from cluster.balancing.decision import Candidate, Policy, Question, Target
from cluster.balancing.lane_view import LaneView
from cluster.balancing.recording import (
    BadRecording,
    RecordedDecision,
    read_decisions,
    replay,
    write_decisions,
)
from tests.lanes import make_lane

counts = st.integers(0, 300)
rates = st.floats(0.0, 1e6, allow_nan=False)

lanes = st.builds(
    LaneView,
    replica_id=st.text(max_size=8),
    lane=st.integers(0, 3),
    running=counts,
    waiting=counts,
    waiting_prefill_tokens=counts,
    unseen_requests=counts,
    unseen_prefill_tokens=counts,
    in_flight=counts,
    max_sequences=st.integers(1, 256),
    max_waiting=counts,
    free_kv_tokens=st.integers(0, 100_000),
    snapshot_age_s=st.floats(0.0, 3.0),
    step_ms=rates,
    prefill_tokens_per_s=rates,
    step_ms_per_sequence=rates,
    idle_power_w=rates,
    active_power_w=rates,
    attached_age_s=rates,
)
questions = st.builds(
    Question,
    policy=st.sampled_from(Policy),
    target=st.builds(Target, ttft_s=rates, tpot_s=rates),
    prompt_tokens=counts,
    output_tokens=counts,
    candidates=st.lists(
        st.builds(Candidate, lane=lanes, cached_tokens=counts, is_session=st.booleans()), max_size=6
    ).map(tuple),
    draw=st.integers(0, 2**32 - 1),
    turn=counts,
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(questions, max_size=3))
def test_a_recorded_decision_is_read_back_and_taken_again(asked: list[Question]) -> None:
    answered = [(question, choose(question)) for question in asked]
    decisions = tuple(
        RecordedDecision(question=question, choice=choice) for question, choice in answered if choice
    )
    back = read_decisions(write_decisions(decisions))
    assert back == decisions
    assert [replay(one) for one in back] == [one.choice for one in decisions]


def make_decision() -> RecordedDecision:
    question = Question(
        policy=Policy.ENERGY,
        target=Target(ttft_s=1.0, tpot_s=0.1),
        prompt_tokens=100,
        output_tokens=50,
        candidates=(Candidate(lane=make_lane("a")), Candidate(lane=make_lane("b"))),
        draw=7,
    )
    choice = choose(question)
    assert choice is not None
    return RecordedDecision(question=question, choice=choice)


def test_a_changed_load_shows_in_the_replay() -> None:
    decision = make_decision()
    chosen = decision.choice.index
    busy = [
        replace(one, lane=replace(one.lane, running=8, waiting=4)) if index == chosen else one
        for index, one in enumerate(decision.question.candidates)
    ]
    changed = replace(decision, question=replace(decision.question, candidates=tuple(busy)))
    again = replay(changed)
    assert again is not None and again.index == 1 - chosen


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("wattline-decisions/1", "other/1", "format"),
        ('"policy": "energy"', '"policy": "magic"', "none of energy, prefix"),
        ('"draw": 7', '"draw": -7', "no count"),
        ('"running": 0', '"running": "many"', "no int"),
        ('"max_sequences": 8', '"max_sequences": 0', "at least 1"),
        ('"is_session": false', '"is_session": 3', "neither true nor false"),
        ('"index": ', '"index": 1', "does not fit"),
        ('"turn": 0', '"turns": 0', "exactly the fields"),
    ],
)
def test_a_document_that_is_not_ours_is_refused_with_its_place(old: str, new: str, says: str) -> None:
    text = write_decisions([make_decision()])
    assert old in text
    with pytest.raises(BadRecording, match=says):
        read_decisions(text.replace(old, new))


@pytest.mark.parametrize("text", ["", "[]", "null", json.dumps({"format": "wattline-decisions/1"})])
def test_what_is_no_document_is_refused(text: str) -> None:
    with pytest.raises(BadRecording):
        read_decisions(text)
