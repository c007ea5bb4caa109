"""Several asynchronous generators as one: what they give as it comes, the first error ends all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


async def side_by_side(parts: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """Holds one item of each at most. Closing it, at any point, closes all of them."""
    waiting = {asyncio.create_task(_next(part)): part for part in parts}
    try:
        while waiting:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in waiting if task.done()]:
                part = waiting.pop(task)
                for item in task.result():
                    waiting[asyncio.create_task(_next(part))] = part
                    yield item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for part in parts:
            await part.aclose()


async def _next(part: AsyncGenerator[Item, None]) -> tuple[Item, ...]:
    """The next item; none: it has ended."""
    try:
        return (await anext(part),)
    except StopAsyncIteration:
        return ()
