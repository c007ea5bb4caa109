"""Which lanes hold which blocks of KV: what replicas say of their prefix caches, as far as it is remembered.

A hint, never a promise: an entry may be late or missing, and then a prompt is computed where it could have
been found. Bounded: what nobody asked for longest is let go first. Hashes are those of
`replicas/engine/prefix_hash.py`, salted per tenant, so that a tenant finds only its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

MAX_BLOCKS = 1 << 18
"""Some 60 MB: four million tokens of prompts at 16 a block."""
MAX_OWNERS = 64
"""Of one block; what so many lanes hold is no reason to choose one of them."""

LaneKey: TypeAlias = tuple[str, int]
"""Replica id and lane."""


class PrefixIndex:
    """Mutable; owned by the event loop."""

    def __init__(self, *, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._owners: OrderedDict[bytes, set[LaneKey]] = OrderedDict()
        self._blocks: dict[LaneKey, set[bytes]] = {}

    def __len__(self) -> int:
        """Blocks known, whoever holds them."""
        return len(self._owners)

    def replace(self, owner: LaneKey, added: Iterable[bytes]) -> None:
        """A snapshot: `added` is all that the lane holds."""
        self._forget_lane(owner)
        self.update(owner, added=added, removed=())

    def update(self, owner: LaneKey, *, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """What a lane has filed and let go since it last spoke."""
        held = self._blocks.setdefault(owner, set())
        for block_hash in removed:
            if block_hash in held:
                held.remove(block_hash)
                self._disown(owner, block_hash)
        for block_hash in added:
            owners = self._owners.setdefault(block_hash, set())
            if len(owners) < MAX_OWNERS:
                owners.add(owner)
                held.add(block_hash)
        while len(self._owners) > self._max_blocks:
            block_hash, owners = self._owners.popitem(last=False)
            for each in owners:
                self._blocks[each].discard(block_hash)

    def forget(self, replica_id: str) -> None:
        """The replica is gone, or begins anew."""
        for owner in [owner for owner in self._blocks if owner[0] == replica_id]:
            self._forget_lane(owner)

    def match(self, hashes: Sequence[bytes]) -> dict[LaneKey, int]:
        """How many leading blocks of a prompt each lane holds; lanes without the first are left out."""
        found: dict[LaneKey, int] = {}
        for count, block_hash in enumerate(hashes, 1):
            owners = self._owners.get(block_hash)
            if not owners:
                break
            self._owners.move_to_end(block_hash)
            holding = [owner for owner in owners if count == 1 or found.get(owner) == count - 1]
            if not holding:
                break
            for owner in holding:
                found[owner] = count
        return found

    def check(self) -> None:
        """Assert that both directions agree; for tests."""
        pairs = {(owner, block) for block, owners in self._owners.items() for owner in owners}
        assert pairs == {(owner, block) for owner, blocks in self._blocks.items() for block in blocks}
        assert all(self._owners.values()), "a block without owners is forgotten"
        assert len(self._owners) <= self._max_blocks

    def _forget_lane(self, owner: LaneKey) -> None:
        for block_hash in self._blocks.pop(owner, ()):
            self._disown(owner, block_hash)

    def _disown(self, owner: LaneKey, block_hash: bytes) -> None:
        owners = self._owners[block_hash]
        owners.discard(owner)
        if not owners:
            del self._owners[block_hash]
