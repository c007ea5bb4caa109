"""`router`: its addresses, and the bounds of what it holds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from cluster.config.section import Section
from cluster.config.security import AuthSection, LinkTlsSection, TlsSection, exposure


class FailoverSection(Section):
    """How streams that lose their replica go on at another one of equal weights and tokens."""

    per_request: int = Field(2, ge=0, le=8, description="how often one stream is moved; 0: never")
    budget_ratio: float = Field(0.1, ge=0.0, le=1.0, description="resumptions per admitted request, at most")
    burst: int = Field(256, ge=1, description="resumptions saved up: the streams of a replica or two")
    wait_s: float = Field(
        0.0, ge=0.0, le=300.0, description="for another replica where none is ready; 0: fail now"
    )
    freeze_s: float = Field(
        2.0, ge=0.5, le=300.0, description="silence under load that counts as frozen, or 5 x the p99 step"
    )


class ProtocolsSection(Section):
    """What is spoken beside `wattline.v1`, which always is."""

    openai: bool = Field(True, description="OpenAI's HTTP under /v1 of the HTTP port")
    oip: bool = Field(True, description="Open Inference Protocol v2 on the gRPC port")


class RouterSection(Section):
    """Addresses are loopback unless told otherwise. Port 0 takes a free one.

    An address that other machines reach is refused without TLS and a way to know callers, unless
    `allow_insecure` says that something else (a mesh, a firewall) sees to it.
    """

    host: str = "127.0.0.1"
    grpc_port: int = Field(50051, ge=0, le=65535)
    http_port: int = Field(8100, ge=0, le=65535)
    link_host: str = "127.0.0.1"
    link_port: int = Field(50052, ge=0, le=65535)
    processes: int = Field(
        1,
        ge=1,
        le=16,
        description="routers that `up` starts on these ports; the next ones link_port + 1, ...",
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="with several processes: /metrics of each by itself, counted up"
    )
    link_addresses: tuple[str, ...] = Field(
        (), description="what replicas dial; empty: link_host:link_port of the router that `up` starts"
    )
    max_prompt_bytes: int = Field(1 << 20, ge=1024)
    max_body_bytes: int = Field(8 << 20, ge=1024, description="of an HTTP request")
    max_streams: int = Field(2048, ge=1, description="streams in flight per router; more are refused")
    tokenizer_threads: int = Field(2, ge=1, le=64)
    stall_buffer_bytes: int = Field(1 << 20, ge=4096, description="held for a reader that does not read")
    energy_record_count: int = Field(4096, ge=1, description="finished requests GetEnergy remembers")
    failover: FailoverSection = FailoverSection()
    protocols: ProtocolsSection = ProtocolsSection()
    tls: TlsSection = TlsSection()
    link_tls: LinkTlsSection = LinkTlsSection()
    auth: AuthSection = AuthSection()
    allow_insecure: bool = Field(False, description="bind public addresses without TLS or callers' keys")
    secret_file: str = Field(
        "", description="32 bytes or more, the same for all routers of one deployment; empty: `up` makes one"
    )
    reflection: Literal["auto", "on", "off"] = Field(
        "auto", description="gRPC server reflection; auto: where callers are not asked who they are"
    )

    @field_validator("link_addresses")
    @classmethod
    def _can_be_dialled(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        """A replica would notice only once its model is loaded, and end."""
        for address in addresses:
            if not address.startswith("unix:") and not _is_host_port(address):
                raise ValueError(f"{address!r} is not host:port; write e.g. router.example:50052")
        return addresses

    @model_validator(mode="after")
    def _is_not_open_to_all(self) -> RouterSection:
        problem = exposure(
            host=self.host,
            link_host=self.link_host,
            tls=self.tls,
            link_tls=self.link_tls,
            auth=self.auth,
        )
        if problem and not self.allow_insecure:
            raise ValueError(f"{problem}; or set allow_insecure: true where something else protects it")
        if self.auth.client_names and not self.tls.client_ca:
            raise ValueError("auth.client_names is set without tls.client_ca; nobody shows a certificate")
        return self

    @property
    def scheme(self) -> str:
        """Of the HTTP port."""
        return "https" if self.tls.is_on else "http"

    @property
    def has_reflection(self) -> bool:
        return self.reflection == "on" or (self.reflection == "auto" and not self.auth.is_on)


def _is_host_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        host.strip("[]").encode("idna")  # As a name is looked up.
    except UnicodeError:
        return False
    is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 2**16
    return bool(host) and is_port and not set(host) & set("/ ")
