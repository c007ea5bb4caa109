"""Which replica a session belongs to: rendezvous hashing. Pure.

Every router finds the same one, and a replica that comes or goes moves only sessions of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

WEIGHT_BYTES = 8


def session_owner(session_id: str, replica_ids: Iterable[str]) -> str | None:
    """The replica whose weight for this session is the highest; None without replicas."""
    session = session_id.encode()
    return max(replica_ids, key=lambda replica_id: (_weight(session, replica_id), replica_id), default=None)


def _weight(session: bytes, replica_id: str) -> bytes:
    return blake2b(replica_id.encode() + b"\0" + session, digest_size=WEIGHT_BYTES).digest()
