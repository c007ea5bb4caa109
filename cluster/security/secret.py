"""The secret that all routers of one deployment share, and what is derived of it: salts and seals.

It never leaves the process. With another one nothing breaks: cached prompts are computed again, and streams
that a dead router left cannot go on.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from cluster.config import ConfigError

SECRET_BYTES = 32
MAX_BYTES = 64
"""What the hash takes as a key."""


@dataclass(frozen=True, slots=True)
class RouterSecret:
    key: bytes = field(repr=False)

    def derive(self, purpose: str) -> bytes:
        """32 bytes that say nothing of the secret, or of what was derived for another purpose."""
        return blake2b(key=self.key, person=purpose.encode(), digest_size=32).digest()


def draw_secret() -> RouterSecret:
    """A new one: for a router that shares nothing with others."""
    return RouterSecret(secrets.token_bytes(SECRET_BYTES))


def read_secret(path: Path) -> RouterSecret:
    """The secret in a file. Raises ConfigError."""
    try:
        content = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"router.secret_file: {path} cannot be read ({error.strerror}); fix it") from error
    if len(content) < SECRET_BYTES:
        raise ConfigError(
            f"router.secret_file: {path} has {len(content)} bytes; {SECRET_BYTES} or more are needed; "
            f"make one with `openssl rand -hex 32`"
        )
    return RouterSecret(blake2b(content, digest_size=MAX_BYTES).digest())


def write_secret(path: Path) -> None:
    """A new secret in a file that only this user reads."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(SECRET_BYTES) + "\n", encoding="ascii")
