"""Which requests may share cached KV: those of one tenant. The salt is made here; a client cannot name one.

Equal on every router with the same secret, so that a prompt cached through one is found through another.
Without the secret nobody can say which hash a block of another tenant's prompt has. Pure.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

SALT_BYTES = 16
DEFAULT_TENANT = "default"
"""All callers, as long as none are told apart."""
MAX_REMEMBERED = 4096


class CacheSalts:
    """The salts of one deployment; `key` is derived of its secret."""

    def __init__(self, key: bytes) -> None:
        self.of = lru_cache(MAX_REMEMBERED)(lambda tenant: cache_salt(tenant, key=key))


def cache_salt(tenant: str, *, key: bytes) -> bytes:
    return blake2b(tenant.encode(), key=key, digest_size=SALT_BYTES, person=b"wattline.tenant").digest()
