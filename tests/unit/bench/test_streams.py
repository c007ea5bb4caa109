"""The closed loop: who starts when, what is noted of each request, and late prompts."""

from __future__ import annotations

import pytest

from bench.streams import Streams
from bench.workload import LatePrompt, Workload


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_workload(*, num_prompts: int, concurrency: int, late: tuple[LatePrompt, ...] = ()) -> Workload:
    prompts = tuple((index,) for index in range(num_prompts))
    return Workload(name="mix", prompts=prompts, output_tokens=2, concurrency=concurrency, late=late)


def started(streams: Streams) -> list[int]:
    return [one.request_id for one in streams.due()]


def test_the_next_request_starts_when_one_ends() -> None:
    streams = Streams(make_workload(num_prompts=3, concurrency=2))
    assert started(streams) == [0, 1]
    streams.deliver(0, [7], is_finished=False)
    assert started(streams) == []
    streams.deliver(0, [8], is_finished=True)
    assert started(streams) == [2]
    for request_id in (1, 2):
        streams.deliver(request_id, [7, 8], is_finished=True)
    assert streams.is_done


def test_times_are_those_of_the_first_and_the_last_token() -> None:
    clock = Clock()
    streams = Streams(make_workload(num_prompts=1, concurrency=1), clock)
    assert started(streams) == [0]
    clock.now_s = 0.5
    streams.deliver(0, [7], is_finished=False)
    clock.now_s = 0.75
    streams.deliver(0, [9], is_finished=True)
    (times,) = streams.times()
    assert (times.ttft_ms, times.tpot_ms, times.longest_gap_s) == (500.0, 250.0, 0.25)
    assert times.head == (7, 9)
    assert streams.wall_s() == 0.75


def test_a_late_prompt_comes_on_top_once_the_streams_have_its_tokens() -> None:
    late = LatePrompt(after_output_tokens=2, prompt=(5,) * 9, output_tokens=1)
    streams = Streams(make_workload(num_prompts=2, concurrency=1, late=(late,)))
    assert started(streams) == [0]
    streams.deliver(0, [7], is_finished=False)
    assert started(streams) == []
    streams.deliver(0, [7], is_finished=True)
    assert started(streams) == [1, 2]
    streams.deliver(2, [4], is_finished=True)
    streams.deliver(1, [7, 7], is_finished=True)
    assert [one.is_late for one in streams.times()] == [False, False, True]


def test_an_answer_of_another_length_is_an_error() -> None:
    streams = Streams(make_workload(num_prompts=1, concurrency=1))
    assert started(streams) == [0]
    with pytest.raises(RuntimeError, match="request 0: asked 2 tokens, got 1"):
        streams.deliver(0, [7], is_finished=True)
