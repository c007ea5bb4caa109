"""`ledger`: the store of closed requests, and how long it remembers."""

from __future__ import annotations

from pydantic import Field, model_validator

from cluster.config.section import Section
from cluster.config.security import is_loopback


class LedgerSection(Section):
    enabled: bool = Field(True, description="`up` runs a store; requests are forgotten without one")
    address: str = Field("", description="host:port of a store that runs elsewhere; empty: the one of `up`")
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535, description="for other machines; 0: only a Unix socket")
    path: str = Field("", description="its SQLite file; empty: runtime_dir/ledger.db")
    request_days: float = Field(30.0, gt=0.0, le=3650.0, description="requests are kept one by one")
    sums_days: float = Field(400.0, gt=0.0, le=3650.0, description="their hourly sums are kept")
    max_requests: int = Field(
        5_000_000, ge=1000, description="kept one by one, at most, but for two hours' worth; about 300 B each"
    )
    allow_insecure: bool = Field(False, description="listen on a public address, in plain text")

    @model_validator(mode="after")
    def _is_not_open_to_all(self) -> LedgerSection:
        if not is_loopback(self.host) and not self.allow_insecure:
            raise ValueError(
                f"host={self.host}: the store asks nobody who they are; use a loopback address, or set "
                "allow_insecure: true where a mesh or a firewall protects it"
            )
        return self
