"""A waiting request is placed by what is cached now, though its prompt is hashed once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from cluster.config import ModelSection
from cluster.link.detokenize_worker import DetokenizeWorker
from cluster.link.reader_pace import ReaderPace
from cluster.link.replica_connection import ReplicaConnection
from cluster.link.replica_pool import ReplicaPool
from cluster.router.route_finder import Errand, RouteFinder
from protos import wattline_link_pb2 as link
from replicas.engine.prefix_hash import extend_hashes

BLOCK_TOKENS = 4
LOAD = link.LoadSnapshot(running=[0], waiting=[0], free_blocks=[99], total_blocks=[99], step_ms=5.0)
SECTION = ModelSection.model_validate({"name": "m", "source": "null"})


class Prompt(tuple[int, ...]):
    """Counts how often it is read."""

    reads = 0

    def __getitem__(self, key: Any) -> Any:
        type(self).reads += 1
        return super().__getitem__(key)


@pytest.fixture
def worker() -> Iterator[DetokenizeWorker]:
    loop = asyncio.new_event_loop()
    worker = DetokenizeWorker(loop)
    yield worker
    worker.close()
    loop.close()


def test_a_waiting_prompt_is_hashed_once_and_asked_for_in_what_is_cached_now(
    worker: DetokenizeWorker,
) -> None:
    pool = ReplicaPool(on_change=lambda: None)
    pool.attach(
        ReplicaConnection(
            hello=link.Hello(
                replica_id="r",
                model="m",
                lanes=1,
                max_sequences=4,
                block_tokens=BLOCK_TOKENS,
                context_tokens=64,
                load=LOAD,
            ),
            epoch=1,
            max_waiting=4,
            freeze_s=2.0,
            worker=worker,
            pace=ReaderPace(),
            clock_s=lambda: 1.0,
        )
    )
    prompt = Prompt(range(10))
    hashes: list[bytes] = []
    extend_hashes(hashes, list(range(10)), block_tokens=BLOCK_TOKENS, salt=b"s")
    errand = Errand(prompt_ids=prompt, output_tokens=8, cache_salt=b"s")
    finder = RouteFinder(pool=pool, random=Random(0))

    def cached_tokens(errand: Errand) -> int:
        place = finder.find(SECTION, errand)
        assert place is not None
        return place.cached_tokens

    pool.prefixes.replace(("other", 0), [b"0" * 16])
    assert cached_tokens(errand) == 0
    pool.prefixes.replace(("r", 0), hashes[:1])
    assert cached_tokens(errand) == BLOCK_TOKENS
    pool.prefixes.replace(("r", 0), hashes)
    assert cached_tokens(errand) == 2 * BLOCK_TOKENS
    assert Prompt.reads == 1
    assert cached_tokens(Errand(prompt_ids=prompt, output_tokens=8, cache_salt=b"another's")) == 0
    assert Prompt.reads == 2
