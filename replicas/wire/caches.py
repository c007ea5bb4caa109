"""What the prefix caches filed and let go."""

from __future__ import annotations

from collections.abc import Iterable

from protos import wattline_link_pb2 as link_pb2
from replicas.engine.prefix_hash import HASH_BYTES
from replicas.request import CacheChange


def cache_to_wire(changes: Iterable[CacheChange]) -> list[link_pb2.CacheChange]:
    return [
        link_pb2.CacheChange(
            lane=change.lane,
            added=b"".join(change.added),
            removed=b"".join(change.removed),
            is_snapshot=change.is_snapshot,
        )
        for change in changes
    ]


def cache_from_wire(messages: Iterable[link_pb2.CacheChange]) -> tuple[CacheChange, ...]:
    """A hash that is cut short is left out: it could match nothing."""
    return tuple(
        [
            CacheChange(
                lane=message.lane,
                added=_split_hashes(message.added),
                removed=_split_hashes(message.removed),
                is_snapshot=message.is_snapshot,
            )
            for message in messages
        ]
    )


def _split_hashes(joined: bytes) -> tuple[bytes, ...]:
    ends = range(HASH_BYTES, len(joined) + 1, HASH_BYTES)
    return tuple([joined[end - HASH_BYTES : end] for end in ends])
