"""`router.tls`, `router.link_tls` and `router.auth`: who may talk to a router, and how it proves what it is.

Keys and certificates are files; no secret is ever a value of the configuration.
"""

from __future__ import annotations

from ipaddress import ip_address

from pydantic import Field, model_validator

from cluster.config.section import Section


class TlsSection(Section):
    """What callers meet on the gRPC and the HTTP port. All empty: plain text. Read again when it changes."""

    cert: str = Field("", description="PEM file, the router's certificate with its chain")
    key: str = Field("", description="PEM file, the certificate's private key")
    client_ca: str = Field("", description="PEM file; set: callers must show a certificate signed by it")

    @model_validator(mode="after")
    def _is_whole(self) -> TlsSection:
        if bool(self.cert) != bool(self.key):
            raise ValueError(f"{'key' if self.cert else 'cert'} is missing; TLS needs both cert and key")
        if self.client_ca and not self.cert:
            raise ValueError("client_ca is set without cert and key; callers are only asked over TLS")
        return self

    @property
    def is_on(self) -> bool:
        return bool(self.cert)


class LinkTlsSection(Section):
    """What routers and replicas show each other on the link: always both ways. All empty: plain text.

    Whoever has a certificate of this CA is a replica: give the link a CA of its own.
    """

    ca: str = Field("", description="PEM file; signed the certificates of both ends")
    cert: str = Field("", description="PEM file, the router's certificate")
    key: str = Field("", description="PEM file, its private key")
    replica_cert: str = Field("", description="PEM file, what replicas show; empty: cert")
    replica_key: str = Field("", description="PEM file, its private key; empty: key")
    server_name: str = Field("", description="the name in the router's certificate; empty: what is dialled")

    @model_validator(mode="after")
    def _is_whole(self) -> LinkTlsSection:
        if any((self.ca, self.cert, self.key)) and not all((self.ca, self.cert, self.key)):
            raise ValueError("ca, cert and key belong together: both ends of the link prove what they are")
        if bool(self.replica_cert) != bool(self.replica_key):
            raise ValueError("replica_cert and replica_key belong together; set both or neither")
        return self

    @property
    def is_on(self) -> bool:
        return bool(self.ca)


class AuthSection(Section):
    """How a caller becomes a tenant. Both ways empty: everybody is the tenant `default`, and an operator."""

    keys_file: str = Field("", description="one API key a line, hashed; `wattline key new` makes them")
    client_names: dict[str, str] = Field(
        {}, description="a name in a caller's certificate (SAN, else CN) to its tenant"
    )
    models: dict[str, tuple[str, ...]] = Field(
        {}, description="tenant to the models it may use; a tenant that is not listed may use all"
    )
    operators: tuple[str, ...] = Field(
        (), description="tenants that may see and steer the whole: Status, DrainReplica, /metrics, /dash"
    )
    protect_pages: bool = Field(True, description="where there are tenants: /metrics and /dash want a key")

    @property
    def is_on(self) -> bool:
        return bool(self.keys_file or self.client_names)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a socket that is bound there. A name other than localhost is not."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def exposure(
    *, host: str, link_host: str, tls: TlsSection, link_tls: LinkTlsSection, auth: AuthSection
) -> str:
    """What would be open to the network and must not be; empty: nothing."""
    if not is_loopback(host):
        if not tls.is_on:
            return f"host {host!r} is reachable from other machines, and tls is off: set tls.cert and tls.key"
        if not (auth.is_on or tls.client_ca):
            return (
                f"host {host!r} is reachable from other machines, and nobody is asked who they are: "
                "set auth.keys_file or tls.client_ca"
            )
    if not (is_loopback(link_host) or link_tls.is_on):
        return (
            f"link_host {link_host!r} is reachable from other machines, and link_tls is off, so that anybody "
            "could pass for a replica: set link_tls.ca, cert and key"
        )
    return ""
