"""What one router has not been told of the prefix caches yet: changes, or that it needs a snapshot.

A router starts out knowing nothing, and is there again when more changed than may wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable

from replicas.request import CacheChange

MAX_PENDING_BLOCKS = 1 << 15


class CacheNews:
    """Lives on one event loop, owned by one outbox."""

    def __init__(self, *, max_pending_blocks: int = MAX_PENDING_BLOCKS) -> None:
        self._max_pending_blocks = max_pending_blocks
        self._changes: list[CacheChange] = []
        self._num_pending = 0
        self._needs_snapshot = True

    def add(self, changes: Iterable[CacheChange]) -> None:
        """In the order they happened. What a snapshot will hold need not wait."""
        if self._needs_snapshot:
            return
        for change in changes:
            self._changes.append(change)
            self._num_pending += len(change.added) + len(change.removed)
        if self._num_pending > self._max_pending_blocks:
            self._reset()
            self._needs_snapshot = True

    def take(self) -> tuple[CacheChange, ...] | None:
        """All that waits; None: send a snapshot instead, which this call takes for sent."""
        if self._needs_snapshot:
            self._needs_snapshot = False
            return None
        changes = tuple(self._changes)
        self._reset()
        return changes

    def _reset(self) -> None:
        self._changes.clear()
        self._num_pending = 0
