"""Ranks of several hosts meet at ports that are open before they are told."""

from __future__ import annotations

import os
import socket

import pytest

from replicas.parallel.rendezvous import GLOO_INTERFACE, choose_interface, open_rendezvous


def test_both_ports_listen_before_anybody_is_told() -> None:
    meeting = open_rendezvous("127.0.0.1")
    try:
        assert meeting.plan_port != meeting.store_port
        for port in (meeting.plan_port, meeting.store_port):
            socket.create_connection((meeting.host, port)).close()
    finally:
        os.close(meeting.plan_fd)
        os.close(meeting.store_fd)


def test_gloo_takes_the_network_of_rank_0_unless_the_operator_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = open_rendezvous("127.0.0.1")
    os.close(meeting.plan_fd)
    os.close(meeting.store_fd)
    monkeypatch.setenv(GLOO_INTERFACE, "chosen")
    choose_interface(meeting)
    assert os.environ[GLOO_INTERFACE] == "chosen"
    monkeypatch.delenv(GLOO_INTERFACE)
    choose_interface(meeting)
    assert os.environ[GLOO_INTERFACE] in [name for _, name in socket.if_nameindex()]
