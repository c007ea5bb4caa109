"""Line and engine are asked the same, at times drawn alike, so that what differs is the line's."""

from __future__ import annotations

import asyncio

from bench.edge.first_tokens import (
    Question,
    draw_questions,
    requests_per_caller,
    time_questions,
    ttft_row,
)

CALLERS = 2
COUNT = requests_per_caller(CALLERS)


def draw(*, seed: int, answer_s: float = 0.0) -> list[tuple[Question, ...]]:
    return draw_questions(callers=CALLERS, seed=seed, vocab_size=1000, answer_s=answer_s)


def test_a_seed_draws_the_same_questions_and_pauses() -> None:
    assert draw(seed=1, answer_s=0.1) == draw(seed=1, answer_s=0.1) != draw(seed=2, answer_s=0.1)
    numbers = [question.number for own in draw(seed=1) for question in own]
    assert numbers == list(range(CALLERS * COUNT))


async def test_callers_ask_side_by_side_and_each_one_thing_after_another() -> None:
    asked: list[int] = []
    both = asyncio.Barrier(CALLERS)

    async def ask(question: Question) -> float:
        asked.append(question.number)
        await both.wait()
        return float(question.number)

    waits_ms = await time_questions(draw(seed=1), ask)
    assert waits_ms == [float(number) for number in range(CALLERS * COUNT)]
    assert [number for number in asked if number < COUNT] == list(range(COUNT))


def test_what_is_added_is_the_difference_of_the_medians() -> None:
    row = ttft_row(
        1, line_ms=[9.0, 10.0, 30.0], engine_ms=[6.0, 7.0, 8.0], echo_ms=[1.0, 2.0, 3.0], relay_ms=[4.0]
    )
    assert (row["added_ttft_ms_p50"], row["echo_ttft_ms_p50"], row["added_ttft_ms_p99"]) == (3.0, 2.0, 22.0)
