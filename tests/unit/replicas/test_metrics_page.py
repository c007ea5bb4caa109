"""Where /metrics of replicas and agents listens, and who may read it."""

from __future__ import annotations

import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from replicas.config import MetricsAccess
from replicas.metrics_page import MetricsPage
from tests.certificates import Authority


def make_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("seen", "Something.", registry=registry).inc(3)
    return registry


def test_what_is_announced_may_differ_from_where_it_listens() -> None:
    assert MetricsAccess(host="0.0.0.0", announced_host="10.0.0.7").address(9102) == "10.0.0.7:9102"
    assert MetricsAccess(host="::1").address(9102) == "[::1]:9102"
    page = MetricsPage(make_registry(), MetricsAccess())
    try:
        with urllib.request.urlopen(f"http://{page.address}/metrics", timeout=60) as answer:
            assert b"seen_total 3.0" in answer.read()
    finally:
        page.close()


def test_over_tls_scrapers_show_a_certificate(tmp_path: Path) -> None:
    nodes, scrapers = Authority(tmp_path / "nodes"), Authority(tmp_path / "scrapers")
    node, scraper = nodes.issue("node"), scrapers.issue("prometheus")
    access = MetricsAccess(cert=str(node.cert), key=str(node.key), client_ca=str(scrapers.ca))
    page = MetricsPage(make_registry(), access)
    trusting = ssl.create_default_context(cafile=str(nodes.ca))
    try:
        assert page.address.startswith("https://127.0.0.1:")
        # TLS 1.3: the server's refusal may come with the handshake, or only with the first read.
        with pytest.raises((urllib.error.URLError, ConnectionError, ssl.SSLError)):
            urllib.request.urlopen(f"{page.address}/metrics", timeout=60, context=trusting)
        trusting.load_cert_chain(scraper.cert, scraper.key)
        with urllib.request.urlopen(f"{page.address}/metrics", timeout=60, context=trusting) as answer:
            assert b"seen_total 3.0" in answer.read()
    finally:
        page.close()


def test_a_scraper_that_never_shakes_hands_keeps_nobody_waiting(tmp_path: Path) -> None:
    nodes = Authority(tmp_path / "nodes")
    node = nodes.issue("node")
    page = MetricsPage(make_registry(), MetricsAccess(cert=str(node.cert), key=str(node.key)))
    host, _, port = page.address.removeprefix("https://").rpartition(":")
    with socket.create_connection((host, int(port))):
        trusting = ssl.create_default_context(cafile=str(nodes.ca))
        with urllib.request.urlopen(f"{page.address}/metrics", timeout=60, context=trusting) as answer:
            assert b"seen_total 3.0" in answer.read()
        page.close()


def test_certificates_that_cannot_be_read_are_named() -> None:
    with pytest.raises(OSError, match=r"/metrics cannot be read \(none.pem, none.key\)"):
        MetricsPage(make_registry(), MetricsAccess(cert="none.pem", key="none.key"))
