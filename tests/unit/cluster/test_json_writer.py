"""Large documents are written a piece at a time, and the event loop has a turn between any two."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import pairwise

import pytest

from cluster.openai.json_pieces import ENTRIES_OF_PIECE, Entries, json_pieces
from cluster.openai.json_writer import JsonWriter

DOCUMENTS_BESIDE = 3


@pytest.mark.parametrize("count", [0, 1, ENTRIES_OF_PIECE, ENTRIES_OF_PIECE + 1, 5 * ENTRIES_OF_PIECE])
def test_pieces_are_the_document(count: int) -> None:
    entries = [{"token": "Pfählé \x00", "top": [None, index, 0.5]} for index in range(count)]
    pieces = list(
        json_pieces({"id": "[", "few": Entries(iter(entries)), "text": '"]', "same": Entries(entries)})
    )

    expected = {"id": "[", "few": entries, "text": '"]', "same": entries}
    assert b"".join(pieces).decode() == json.dumps(expected, ensure_ascii=False, separators=(",", ":"))
    assert len(pieces) == 1 + 2 * (count // ENTRIES_OF_PIECE)


async def test_documents_beside_each_other_have_a_piece_in_a_turn_of_the_loop() -> None:
    writer, num_made, made_by_turn = JsonWriter(), 0, []

    def make() -> Iterator[int]:
        nonlocal num_made
        for index in range(20 * ENTRIES_OF_PIECE):
            num_made += 1
            yield index

    writing = [asyncio.create_task(writer.write({"said": Entries(make())})) for _ in range(DOCUMENTS_BESIDE)]
    await asyncio.sleep(0)
    while not all(task.done() for task in writing):
        made_by_turn.append(num_made)
        await asyncio.sleep(0)

    assert max(after - before for before, after in pairwise(made_by_turn)) <= ENTRIES_OF_PIECE
    assert all(json.loads(b"".join(task.result()))["said"][-1] == num_made // 3 - 1 for task in writing)
