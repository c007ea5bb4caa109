"""The names of KV blocks: what a block holds depends on its own tokens and on all before them.

    hash(block) = blake2b-128(hash(block before) + its tokens, key = salt)

Two sequences of one salt share a name only where they share every token up to the block's end; 128 bits make
an accident unthinkable, and the key keeps one tenant from finding, or from timing, what another has cached.
Full blocks only: a block still being filled has no name. Pure.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

HASH_BYTES = 16
MAX_SALT_BYTES = blake2b.MAX_KEY_SIZE
_ROOT = bytes(HASH_BYTES)
_TOKEN = "I"


def extend_hashes(hashes: list[bytes], tokens: list[int], *, block_tokens: int, salt: bytes) -> None:
    """Append the hashes of the full blocks of `tokens` that `hashes` does not reach yet."""
    parent = hashes[-1] if hashes else _ROOT
    for start in range(len(hashes) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        words = array(_TOKEN, tokens[start : start + block_tokens]).tobytes()
        parent = blake2b(parent + words, digest_size=HASH_BYTES, key=salt).digest()
        hashes.append(parent)
