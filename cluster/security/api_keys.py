"""API keys: made once, kept as a hash, found by their id. Pure but for `KeyRing`, which reads the file.

    wl_3f9a1c2b7d05_kJ8...   a key: its id, then 256 random bits
    acme: 3f9a1c2b7d05 sha256:9c1e... label=laptop expires=2027-06-30   its line in the file

A plain SHA-256 is enough for, and only for, keys that are made here: nobody guesses 256 random bits, and with
a slow hash anybody could keep the router busy with wrong keys.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from hashlib import sha256
from pathlib import Path
from time import monotonic

from cluster.config import ConfigError
from cluster.security.watched_files import WatchedFiles

PREFIX = "wl"
ID_BYTES = 6
SECRET_BYTES = 32
MAX_KEY_CHARS = 128
MAX_FILE_BYTES = 4 * 2**20
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LABEL = re.compile(r"[^\s#]{1,64}")
"""What follows a # is a comment."""
LINE = re.compile(
    r"(?P<tenant>[^\s:]+)\s*:\s*(?P<id>[0-9a-f]{12})\s+sha256:(?P<digest>[0-9a-f]{64})"
    r"(?:\s+label=(?P<label>\S+))?(?:\s+expires=(?P<expires>\S+))?"
)
SHAPE = (
    "TENANT: ID sha256:HASH [label=WORD] [expires=YYYY-MM-DD]; `wattline key new TENANT` prints such a line"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One line of the file. `expires_on` is the last day (UTC) it holds; None: it does not expire."""

    tenant: str
    key_id: str
    digest: bytes
    label: str = ""
    expires_on: date | None = None

    @property
    def line(self) -> str:
        label = f" label={self.label}" if self.label else ""
        expires = f" expires={self.expires_on.isoformat()}" if self.expires_on else ""
        return f"{self.tenant}: {self.key_id} sha256:{self.digest.hex()}{label}{expires}"


def make_key(tenant: str, *, label: str = "", expires_on: date | None = None) -> tuple[str, ApiKey]:
    """A new key, for its owner alone, and what is kept of it. Raises ConfigError for a bad name."""
    check_tenant(tenant)
    if label and not LABEL.fullmatch(label):
        raise ConfigError(
            f"label: got {label[:80]!r}; allowed: up to 64 characters without a space or #; change it"
        )
    key_id = secrets.token_hex(ID_BYTES)
    key = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    return key, ApiKey(tenant=tenant, key_id=key_id, digest=_digest(key), label=label, expires_on=expires_on)


def check_tenant(tenant: str) -> None:
    """Raises ConfigError for what cannot name a tenant."""
    if not TENANT.fullmatch(tenant):
        raise ConfigError(
            f"tenant: got {tenant[:80]!r}; allowed: letters, digits and . _ -, the first a letter or digit, "
            "64 characters at most; choose another name"
        )


def parse_keys(text: str, *, origin: str) -> dict[str, ApiKey]:
    """The keys of a file by their id. Raises ConfigError naming the line, but nothing of what is in it."""
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        key = _parse_line(line)
        if key is None:
            raise ConfigError(f"{origin}, line {number}: is no key; write {SHAPE}")
        if key.key_id in keys:
            raise ConfigError(f"{origin}, line {number}: key {key.key_id} is there twice; remove one")
        keys[key.key_id] = key
    return keys


def find_tenant(keys: Mapping[str, ApiKey], presented: str, *, now: datetime) -> str | None:
    """Whose key it is; None: nobody's, or its time is over. One hash, one comparison in constant time."""
    if len(presented) > MAX_KEY_CHARS or not presented.isascii():
        return None
    prefix, _, rest = presented.partition("_")
    key = keys.get(rest.partition("_")[0])
    if prefix != PREFIX or key is None or not hmac.compare_digest(_digest(presented), key.digest):
        return None
    is_over = key.expires_on is not None and now.astimezone(UTC).date() > key.expires_on
    return None if is_over else key.tenant


class KeyRing:
    """The keys of a file, read again when it changes: a key that is taken out is refused a second later."""

    def __init__(self, path: Path, *, clock_s: Callable[[], float] = monotonic) -> None:
        self._path = path
        self._watched = WatchedFiles((path,), clock_s=clock_s)
        self._keys = read_keys(path)
        self._said = ""

    @property
    def keys(self) -> Mapping[str, ApiKey]:
        """By id. A file that cannot be used any more leaves the keys as they were, and a line in the log."""
        if self._watched.changed():
            try:
                self._keys = read_keys(self._path)
                self._said = ""
                logger.info("api_keys_reloaded count=%d", len(self._keys))
            except ConfigError as error:
                self._watched.look_again()
                if str(error) != self._said:
                    logger.error("api_keys_kept reason=%s", error)
                self._said = str(error)
        return self._keys


def read_keys(path: Path) -> dict[str, ApiKey]:
    """Raises ConfigError."""
    try:
        about = path.stat()
        if stat.S_IMODE(about.st_mode) & 0o002:
            raise ConfigError(f"router.auth.keys_file: everybody may write to {path}; `chmod o-w` it")
        if about.st_size > MAX_FILE_BYTES:
            raise ConfigError(
                f"router.auth.keys_file: {path} has {about.st_size} bytes; {MAX_FILE_BYTES} is the limit"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"router.auth.keys_file: {path} cannot be read ({error}); fix it") from error
    return parse_keys(text, origin=f"router.auth.keys_file: {path}")


def _parse_line(line: str) -> ApiKey | None:
    found = LINE.fullmatch(line)
    if found is None or not TENANT.fullmatch(found["tenant"]):
        return None
    try:
        expires_on = date.fromisoformat(found["expires"]) if found["expires"] else None
    except ValueError:
        return None
    return ApiKey(
        tenant=found["tenant"],
        key_id=found["id"],
        digest=bytes.fromhex(found["digest"]),
        label=found["label"] or "",
        expires_on=expires_on,
    )


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()
