"""Files and headers that say who may call: keys, certificates and credentials, whatever is in them."""

from __future__ import annotations

from base64 import b64encode
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.config import ConfigError
from cluster.security.api_keys import ApiKey, find_tenant, parse_keys
from cluster.security.auth import presented_key
from cluster.security.certificates import CertificateFiles
from tests.certificates import Authority

NOW = datetime(2026, 11, 22, tzinfo=UTC)
KEY = "wl_0123456789ab_" + "k" * 43
HELD = ApiKey(tenant="acme", key_id="0123456789ab", digest=sha256(KEY.encode()).digest())
KEYS = f"acme: 46638d1801d3 sha256:{'0' * 64} label=laptop expires=2027-02-20\n# a comment\n".encode()
BASIC = b"Basic " + b64encode(b"user:" + KEY.encode())
LOCKED_KEY = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIGbMA==\n-----END ENCRYPTED PRIVATE KEY-----\n"


def fuzz_keys(content: bytes) -> None:
    """What is read is written the same, and nobody's key opens another."""
    with suppress(ConfigError):
        keys = parse_keys(content.decode(errors="replace"), origin="fuzz")
        assert parse_keys("".join(f"{key.line}\n" for key in keys.values()), origin="again") == keys
        for key_id in keys:
            assert find_tenant(keys, f"wl_{key_id}_guess", now=NOW) is None


def fuzz_credential(content: bytes) -> None:
    """A header as a server hands it on: bytes as Latin-1."""
    value = content.decode("latin-1")
    for name in ("authorization", "x-api-key"):
        for allows_basic in (False, True):
            shown = presented_key([(name, value)], allows_basic=allows_basic)
            assert find_tenant({HELD.key_id: HELD}, shown, now=NOW) == ("acme" if shown == KEY else None)


def fuzz_certificates(content: bytes) -> None:
    """One file for all three parts: OpenSSL takes of it what it looks for."""
    with TemporaryDirectory(prefix="wl-") as folder:
        path = Path(folder) / "all.pem"
        path.write_bytes(content)
        with suppress(ConfigError):
            CertificateFiles(owner="fuzz", cert=path, key=path, peer_ca=path).load()
        with suppress(ConfigError):
            CertificateFiles(owner="fuzz", cert=path, key=path).load()


def make_pem() -> bytes:
    """A certificate, its key, and the authority's certificate."""
    with TemporaryDirectory(prefix="wl-") as folder:
        authority = Authority(Path(folder))
        pem = authority.issue("router")
        return pem.cert.read_bytes() + pem.key.read_bytes() + authority.ca.read_bytes()
