"""PEM files make a server's context, or an error that says what to give instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from cluster.config import ConfigError
from cluster.security.certificates import CertificateFiles
from tests.certificates import Authority


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    pem = Authority(tmp_path).issue("router")
    key = serialization.load_pem_private_key(pem.key.read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    pem.key.write_bytes(locked)
    with pytest.raises(ConfigError, match="the key without a password"):
        CertificateFiles(owner="router.tls", cert=pem.cert, key=pem.key).load()


def test_whom_to_trust_has_to_be_a_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pem = authority.issue("router")
    files = CertificateFiles(owner="router.tls", cert=pem.cert, key=pem.key, peer_ca=authority.ca)
    files.load()
    with pytest.raises(ConfigError, match=r"router\.tls: "):
        replace(files, peer_ca=pem.key).load()
