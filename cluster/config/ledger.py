"""`ledger`: the store of closed requests, and how long it remembers."""

from __future__ import annotations

from pydantic import Field

from cluster.config.section import Section


class LedgerSection(Section):
    enabled: bool = Field(True, description="`up` runs a store; requests are forgotten without one")
    address: str = Field("", description="host:port of a store that runs elsewhere; empty: the one of `up`")
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535, description="of the store that `up` runs; 0 takes a free one")
    path: str = Field("", description="its SQLite file; empty: runtime_dir/ledger.db")
    request_days: float = Field(30.0, gt=0.0, le=3650.0, description="requests are kept one by one")
    sums_days: float = Field(400.0, gt=0.0, le=3650.0, description="their hourly sums are kept")
    max_requests: int = Field(5_000_000, ge=1000, description="kept one by one, at most; about 300 B each")
