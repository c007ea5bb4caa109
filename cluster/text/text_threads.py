"""Threads for work on text, so that a long prompt keeps no stream waiting.

A hand-over takes a tenth of a millisecond and wakes two threads, and what is written in Python holds up the
event loop from there as well: short work is done on the spot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.request.completion import ChatPrompt, TextPrompt

Result = TypeVar("Result")

MAX_SIZE_ON_THE_SPOT = 512
"""Characters or tokens: some 0.2 ms of the event loop."""
SAID_SIZE = 64
"""Characters of what is said of one token: its own text, and those of likely ones beside it."""
TURN_SIZE = 32
"""What a template adds to each turn of a conversation, in characters."""


class TextThreads:
    """Owns the threads. Call it from the event loop."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")

    async def run(self, work: Callable[[], Result], *, size: int) -> Result:
        """The result of `work`, which goes through `size` characters or tokens; raises what it raises."""
        if size <= MAX_SIZE_ON_THE_SPOT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """What has not begun never will; waits for nothing."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def prompt_size(prompt: TextPrompt | ChatPrompt) -> int:
    """Characters to be tokenised."""
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    return sum([len(turn.content) + TURN_SIZE for turn in prompt.turns])
