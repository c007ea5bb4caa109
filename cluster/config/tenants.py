"""`tenants[]`: whose requests are told apart, and what each may have."""

from __future__ import annotations

from pydantic import Field

from cluster.admission.tenant import Tenant
from cluster.config.section import Section


class TenantSection(Section):
    """Limits are per router process; a limit that is left out does not exist."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    weight: float = Field(1.0, gt=0.0, le=1000.0, description="share where tenants compete")
    priority_max: int = Field(100, ge=-100, le=100, description="requests above it are served as this")
    requests_per_s: float | None = Field(None, gt=0.0)
    tokens_per_s: float | None = Field(None, gt=0.0, description="prompt and output tokens together")
    concurrent: int | None = Field(None, ge=1, description="requests under way, waiting ones included")
    joules_per_day: float | None = Field(None, gt=0.0, description="days begin at midnight UTC")

    def to_tenant(self) -> Tenant:
        return Tenant(**self.model_dump())
