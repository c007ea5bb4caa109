"""Which requests may share cached KV: those of one tenant. The salt is made here; a client cannot name one.

Equal on every router, so that a prompt cached through one is found through another. Pure.
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b

SALT_BYTES = 16
DEFAULT_TENANT = "default"
"""All callers, as long as none are told apart."""


@cache
def cache_salt(tenant: str) -> bytes:
    return blake2b(tenant.encode(), digest_size=SALT_BYTES, person=b"wattline.tenant").digest()
