"""Stories are found by request and trace, and bounded by count and by what they hold."""

from __future__ import annotations

import pytest

from cluster.balancing.balancer import choose
from cluster.balancing.decision import Candidate, Policy, Question, Target
from cluster.balancing.recording import RecordedDecision
from cluster.energy.account import EnergyAccount
from cluster.link.batch_sizes import BatchSizes, BatchSpread
from cluster.request.errors import UnknownRequest
from cluster.router.story import Leg, Story
from cluster.router.story_record import StoryRecord
from tests.lanes import make_lane


def make_leg(num_candidates: int) -> Leg:
    question = Question(
        policy=Policy.LEAST_LOADED,
        target=Target(ttft_s=1.0, tpot_s=0.1),
        prompt_tokens=1,
        output_tokens=1,
        candidates=tuple(Candidate(lane=make_lane(str(index))) for index in range(num_candidates)),
        draw=0,
    )
    choice = choose(question)
    assert choice is not None
    return Leg(
        choice_index=0,
        replica_id="a",
        epoch=1,
        lane=0,
        decision=RecordedDecision(question=question, choice=choice),
        submitted_s=0.0,
        first_token_s=None,
        last_token_s=None,
        first_offset=0,
        num_tokens=0,
        wasted_tokens=0,
        batches=None,
        loss=None,
        timing=None,
        account=EnergyAccount(),
    )


def make_story(request_id: str, trace_id: str = "t", *, num_candidates: int = 0) -> Story:
    legs = (make_leg(num_candidates),) if num_candidates else ()
    return Story(
        request_id=request_id, trace_id=trace_id, tenant="default", model="m", ended_s=0.0, legs=legs
    )


def ids(record: StoryRecord, wanted: str) -> list[str]:
    return [story.request_id for story in record.find(wanted)]


def test_a_trace_has_all_its_requests_in_order() -> None:
    record = StoryRecord()
    for request_id, trace_id in (("1", "t"), ("2", "u"), ("3", "t")):
        record.add(make_story(request_id, trace_id))
    assert ids(record, "t") == ["1", "3"]
    assert ids(record, "2") == ["2"]


def test_the_oldest_is_forgotten_with_its_place_in_the_trace() -> None:
    record = StoryRecord(max_stories=2)
    for request_id in ("1", "2", "3"):
        record.add(make_story(request_id))
    assert ids(record, "t") == ["2", "3"]
    with pytest.raises(UnknownRequest, match="the last 2 are remembered"):
        record.find("1")


def test_large_stories_leave_room_for_fewer() -> None:
    record = StoryRecord(max_candidates=10)
    for request_id in ("1", "2", "3"):
        record.add(make_story(request_id, num_candidates=4))
    assert ids(record, "t") == ["2", "3"]
    record.add(make_story("huge", num_candidates=11))
    assert len(record) == 0


def test_a_request_told_twice_is_kept_once() -> None:
    record = StoryRecord()
    record.add(make_story("1", "t"))
    record.add(make_story("1", "u"))
    assert ids(record, "u") == ["1"]
    with pytest.raises(UnknownRequest):
        record.find("t")


@pytest.mark.parametrize(
    ("sizes", "spread"),
    [
        ([], None),
        ([3], BatchSpread(num_steps=1, min_size=3, median_size=3, max_size=3)),
        ([8, 1, 8, 4], BatchSpread(num_steps=4, min_size=1, median_size=4, max_size=8)),
        ([0, 5000], BatchSpread(num_steps=2, min_size=1, median_size=1, max_size=1023)),
    ],
)
def test_batch_sizes_are_summed_up(sizes: list[int], spread: BatchSpread | None) -> None:
    histogram = BatchSizes()
    for size in sizes:
        histogram.add(size)
    assert histogram.spread() == spread


def test_the_beginning_of_an_id_will_do_if_it_is_long_enough() -> None:
    record = StoryRecord()
    for request_id, trace_id in (("0011223344", "aabbccddee"), ("0011229999", "aabbccddee"), ("77", "88")):
        record.add(make_story(request_id, trace_id))
    assert ids(record, "00112233") == ["0011223344"]
    assert ids(record, "aabbccdd") == ["0011223344", "0011229999"]
    for too_short in ("0011", "", "7"):
        with pytest.raises(UnknownRequest):
            record.find(too_short)
