"""What one tenant may do. Plain data, from `tenants[]` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

OTHER = "other"
"""The label of tenants that are not configured: callers must not make label values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """`weight` is its share where tenants compete. None: no such limit."""

    name: str
    weight: float = 1.0
    priority_max: int = 100
    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    concurrent: int | None = None
    joules_per_day: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitHit:
    """A limit that is reached: its name in the configuration, its value, and when there is room again."""

    limit: str
    value: float
    retry_after_s: float
