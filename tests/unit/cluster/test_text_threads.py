"""Where work on text is done: short on the event loop, long beside it."""

from __future__ import annotations

from collections.abc import Iterator
from threading import current_thread, main_thread

import pytest

from cluster.request.completion import ChatPrompt, TextPrompt, Turn
from cluster.text.text_threads import MAX_SIZE_ON_THE_SPOT, TURN_SIZE, TextThreads, prompt_size


@pytest.fixture
def threads() -> Iterator[TextThreads]:
    made = TextThreads(1)
    yield made
    made.close()


async def test_short_work_is_done_on_the_spot_and_long_work_in_a_thread(threads: TextThreads) -> None:
    short = await threads.run(current_thread, size=MAX_SIZE_ON_THE_SPOT)
    long = await threads.run(current_thread, size=MAX_SIZE_ON_THE_SPOT + 1)

    assert short is main_thread()
    assert long.name.startswith("tokenize")


@pytest.mark.parametrize("size", [1, MAX_SIZE_ON_THE_SPOT + 1])
async def test_what_work_raises_is_raised_to_who_waits_for_it(threads: TextThreads, size: int) -> None:
    def refuse() -> None:
        raise ValueError("no such role")

    with pytest.raises(ValueError, match="no such role"):
        await threads.run(refuse, size=size)


def test_every_turn_of_a_conversation_counts_for_what_its_template_adds() -> None:
    turns = (Turn(role="user", content="four"), Turn(role="assistant", content=""))

    assert prompt_size(TextPrompt(text="four")) == 4
    assert prompt_size(ChatPrompt(turns=turns)) == 4 + 2 * TURN_SIZE
