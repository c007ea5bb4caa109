"""Where the ranks of a group over hosts meet: opened before anybody is told of it, so no port is guessed.

Rank 0 listens on two free ports of its host, one for plans (`tcp.py`), one for the store through which the
collectives find each other (`process_group.py`). Whoever starts the ranks hands the address to the others.
"""

from __future__ import annotations

import os
import socket

from replicas.config import Rendezvous

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_ANY_PORT = 9
"""A datagram socket is connected to it to learn the route; nothing is sent."""


def open_rendezvous(host: str) -> Rendezvous:
    """Listen on two free ports of `host`, an address of this machine. The process owns the descriptors."""
    with _listen(host) as plans, _listen(host) as store:
        plan_port, store_port = plans.getsockname()[1], store.getsockname()[1]
        return Rendezvous(
            host=host,
            plan_port=plan_port,
            store_port=store_port,
            plan_fd=plans.detach(),
            store_fd=store.detach(),
        )


def choose_interface(rendezvous: Rendezvous) -> None:
    """Have gloo use the network on which this host reaches rank 0, unless the environment names one.

    By itself it takes what the host's own name resolves to, which on many systems is loopback.
    """
    if GLOO_INTERFACE not in os.environ and (name := interface_to(rendezvous.host)):
        os.environ[GLOO_INTERFACE] = name


def interface_to(host: str) -> str:
    """The network interface through which this machine reaches `host`; empty if none has such an address."""
    with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, _ANY_PORT))
        own = probe.getsockname()[0]
    import psutil  # noqa: PLC0415 (groups over hosts alone need it; the GPU check goes without)

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == own for address in addresses):
            return str(name)
    return ""


def _listen(host: str) -> socket.socket:
    return socket.create_server((host, 0), family=_family(host))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
