"""Calls into drivers that may never return, kept off the event loop and out of its executor.

A thread of an executor that hangs is one less for everybody, and the process waits for it when it ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from replicas.errors import MeterUnavailable

T = TypeVar("T")


class AsideCalls:
    """Each call in a thread of its own, at most `limit` at once. Lives in one event loop."""

    def __init__(self, *, timeout_s: float = 10.0, limit: int = 8) -> None:
        self._timeout_s = timeout_s
        self._limit = limit
        self._num_open = 0

    async def run(self, function: Callable[[], T], *, drop: Callable[[T], None] = lambda _: None) -> T:
        """What it returns or raises. MeterUnavailable where it takes too long, or too many others do.

        `drop` takes a result that comes when nobody waits for it any more.
        """
        if self._num_open >= self._limit:
            raise MeterUnavailable(
                f"{self._num_open} calls into meters of this host do not return; see what its driver says, "
                "and restart the energy agent"
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def finish(result: T | None, error: BaseException | None) -> None:
            self._num_open -= 1
            if future.done():
                if error is None:
                    drop(result)  # type: ignore[arg-type]
            elif error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def call() -> None:
            result, failure = None, None
            try:
                result = function()
            except BaseException as error:
                failure = error
            try:
                loop.call_soon_threadsafe(finish, result, failure)
            except RuntimeError:
                return  # The loop ended meanwhile.

        self._num_open += 1
        threading.Thread(target=call, name="energy-aside", daemon=True).start()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await future
        except TimeoutError as error:
            raise MeterUnavailable(
                f"a meter of this host did not answer within {self._timeout_s:g} s; see what its driver says"
            ) from error
