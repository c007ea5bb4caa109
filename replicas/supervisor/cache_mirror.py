"""What can be found in the prefix caches of an engine, kept beside it for routers that attach later.

Fed by every step, in order, over the rank's socket, which loses nothing. Owned by the dispatcher.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from replicas.request import CacheChange

MAX_SNAPSHOT_BLOCKS = 1 << 18
"""4 MiB of hashes, half of what a message of the link may hold; what was filed last is left out."""


class CacheMirror:
    def __init__(self) -> None:
        self._lanes: dict[int, dict[bytes, None]] = {}

    def apply(self, changes: Iterable[CacheChange]) -> None:
        for change in changes:
            blocks = self._lanes.setdefault(change.lane, {})
            for block_hash in change.removed:
                blocks.pop(block_hash, None)
            blocks.update(dict.fromkeys(change.added))

    def snapshot(self) -> tuple[CacheChange, ...]:
        """All there is, lane by lane."""
        limit = MAX_SNAPSHOT_BLOCKS // max(1, len(self._lanes))
        return tuple(
            [
                CacheChange(lane=lane, added=tuple(islice(blocks, limit)), is_snapshot=True)
                for lane, blocks in self._lanes.items()
            ]
        )
