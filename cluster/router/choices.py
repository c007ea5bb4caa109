"""Several answers to one prompt, side by side: their seeds, their start, and their deltas as one stream.

Each choice is delivered as if it were alone, failover included; the first error of any ends them all.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from hashlib import blake2b

from cluster.link.replica_connection import ReplicaState
from cluster.request.answer import TextDelta
from cluster.router.run import Run
from cluster.router.side_by_side import side_by_side

SEED_BYTES = 8


def choice_seed(seed: int, index: int) -> int:
    """The first choice draws as a request for one answer does; the others from seeds of their own."""
    if index == 0:
        return seed
    key = seed.to_bytes(SEED_BYTES, "little")
    return int.from_bytes(
        blake2b(index.to_bytes(4, "little"), digest_size=SEED_BYTES, key=key).digest(), "little"
    )


def deliver_choices(
    runs: list[Run],
    num_choices: int,
    *,
    submit: Callable[[int], Awaitable[Run]],
    deliver: Callable[[Run], AsyncGenerator[TextDelta, None]],
) -> AsyncGenerator[TextDelta, None]:
    """Deltas of all choices, as they come. `runs` has the first; those that are begun are added to it.

    The others begin when the first token says that the prompt is computed, so that they find it in the cache.
    """
    if num_choices == 1:
        return deliver(runs[0])
    return _fan_out(runs, num_choices, submit=submit, deliver=deliver)


async def _fan_out(
    runs: list[Run],
    num_choices: int,
    *,
    submit: Callable[[int], Awaitable[Run]],
    deliver: Callable[[Run], AsyncGenerator[TextDelta, None]],
) -> AsyncGenerator[TextDelta, None]:
    first = deliver(runs[0])
    async with aclosing(first):
        async for delta in first:
            # One whose replica is just lost goes on elsewhere, and the others follow it there.
            if delta.finish is not None or runs[0].attempt.connection.state is not ReplicaState.STALLED:
                break
            yield delta
        for index in range(1, num_choices):
            runs.append(await submit(index))
        yield delta
        async with aclosing(side_by_side([first, *(deliver(run) for run in runs[1:])])) as deltas:
            async for each in deltas:
                yield each
