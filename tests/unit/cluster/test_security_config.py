"""What a configuration may expose, and the sentences that refuse the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, ConfigError, load_config, parse_config
from cluster.config.security import is_loopback

TLS = {"cert": "c.pem", "key": "c.key"}
LINK_TLS = {"ca": "ca.pem", "cert": "c.pem", "key": "c.key"}


def parse(router: dict[str, Any]) -> Config:
    return parse_config({"models": [{"name": "m", "source": "null"}], "router": router})


@pytest.mark.parametrize(
    ("host", "is_so"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("router.example", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, is_so: bool) -> None:
    assert is_loopback(host) is is_so


@pytest.mark.parametrize(
    ("router", "problem"),
    [
        ({"host": "0.0.0.0"}, "router: host '0.0.0.0' is reachable from other machines, and tls is off"),
        ({"host": "10.0.0.1", "tls": TLS}, "nobody is asked who they are: set auth.keys_file or"),
        ({"host": "0.0.0.0", "auth": {"keys_file": "k"}}, "tls is off: set tls.cert and tls.key"),
        ({"link_host": "0.0.0.0"}, "anybody could pass for a replica: set link_tls.ca, cert and key"),
        ({"tls": {"cert": "c.pem"}}, "router.tls: key is missing; TLS needs both cert and key"),
        ({"tls": {"client_ca": "ca.pem"}}, "router.tls: client_ca is set without cert and key"),
        ({"link_tls": {"cert": "c.pem"}}, "router.link_tls: ca, cert and key belong together"),
        (
            {"link_tls": {**LINK_TLS, "replica_cert": "r.pem"}},
            "router.link_tls: replica_cert and replica_key belong together",
        ),
        ({"auth": {"client_names": {"a": "acme"}}}, "auth.client_names is set without tls.client_ca"),
    ],
)
def test_what_would_be_open_is_refused(router: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(router)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "router",
    [
        {},
        {"host": "::1", "link_host": "127.0.0.1"},
        {"host": "0.0.0.0", "tls": TLS, "auth": {"keys_file": "k"}},
        {"host": "0.0.0.0", "tls": {**TLS, "client_ca": "ca.pem"}},
        {"link_host": "0.0.0.0", "link_tls": LINK_TLS},
        {"host": "0.0.0.0", "link_host": "0.0.0.0", "allow_insecure": True},
    ],
)
def test_what_is_closed_or_meant_is_taken(router: dict[str, Any]) -> None:
    parse(router)


def test_files_are_found_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    path = tmp_path / "wattline.yaml"
    path.write_text("models: [{name: m, source: 'null'}]\nrouter: {auth: {keys_file: keys}}\n")
    assert load_config(path).router.auth.keys_file == str(tmp_path / "keys")
    (tmp_path / "keys").unlink()
    with pytest.raises(ConfigError, match=r"router\.auth\.keys_file: .* is no file; fix the path"):
        load_config(path)


def test_reflection_is_off_where_callers_are_asked() -> None:
    asked = {"auth": {"keys_file": "k"}}
    assert parse({}).router.has_reflection
    assert not parse(asked).router.has_reflection
    assert parse({**asked, "reflection": "on"}).router.has_reflection


def test_metrics_of_replicas_on_a_public_address_want_certificates_of_scrapers() -> None:
    def parse_telemetry(**telemetry: object) -> Config:
        return parse_config({"models": [{"name": "m", "source": "null"}], "telemetry": telemetry})

    with pytest.raises(ConfigError, match=r"set metrics_tls\.cert, \.key and \.client_ca"):
        parse_telemetry(metrics_host="0.0.0.0", metrics_tls=TLS)
    parse_telemetry(metrics_host="0.0.0.0", metrics_tls=TLS | {"client_ca": "ca.pem"})
    parse_telemetry(metrics_host="0.0.0.0", allow_insecure_metrics=True)
