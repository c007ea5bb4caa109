"""Writes the JSON of all replies of a router: a large document takes turns with everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from cluster.openai.json_pieces import json_pieces


class JsonWriter:
    """One per router, on its event loop: all large documents together have one piece in each turn of it."""

    def __init__(self) -> None:
        self._next = asyncio.Lock()

    async def write(self, document: Mapping[str, Any]) -> list[bytes]:
        """The whole document; a small one at once, as one piece."""
        written: list[bytes] = []
        for piece in json_pieces(document):
            if written:
                async with self._next:
                    await asyncio.sleep(0)
            written.append(piece)
        return written
