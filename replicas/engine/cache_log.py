"""What a lane's prefix cache has filed and let go since it was last asked: the net change.

Bounded by the blocks of the lane, since a hash is filed before it is let go. Pure; owned by one block pool.
"""

from __future__ import annotations


class CacheLog:
    def __init__(self) -> None:
        self._is_filed: dict[bytes, bool] = {}

    def note(self, block_hash: bytes, *, is_filed: bool) -> None:
        """It can be found from now on, or no more. The two take turns, so one undoes the other."""
        if self._is_filed.pop(block_hash, is_filed) is is_filed:
            self._is_filed[block_hash] = is_filed

    def take(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Hashes filed and hashes let go, each in the order it happened."""
        changes, self._is_filed = self._is_filed, {}
        added = tuple([block_hash for block_hash, is_filed in changes.items() if is_filed])
        removed = tuple([block_hash for block_hash, is_filed in changes.items() if not is_filed])
        return added, removed
