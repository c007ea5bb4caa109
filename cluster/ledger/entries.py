"""What the ledger store takes in and gives out. Plain data: no SQL, no protobuf.

Energies are integer millijoules. Measured and estimated ones are told apart by `source` and never added up.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BilledEnergy:
    """The settled joules of one request; `static_mj` and `wasted_mj` are parts of prefill + decode."""

    prefill_mj: int
    decode_mj: int
    static_mj: int
    wasted_mj: int
    source: str
    method: str
    confidence_factor: float
    is_final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEntry:
    """A request that reached a replica and ended. `energy` None: unknown, which is not zero.

    `ended_s` is since 1970. `outcome` is a finish reason, `cancelled`, or the name of a gRPC status.
    """

    request_id: str
    trace_id: str
    tenant: str
    model: str
    outcome: str
    ended_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    wasted_tokens: int
    ttft_ms: float
    total_ms: float
    energy: BilledEnergy | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSums:
    """Running sums of one life of a replica: request + idle + unattributed == meter."""

    replica_id: str
    epoch: int
    model: str
    source: str
    at_s: float
    meter_mj: int
    request_mj: int
    idle_mj: int
    unattributed_mj: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSums:
    """Closed requests of one tenant, model and source. `source` empty: those whose energy is unknown."""

    tenant: str
    model: str
    source: str
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    wasted_tokens: int
    prefill_mj: int
    decode_mj: int
    static_mj: int
    wasted_mj: int
    num_final: int
    worst_confidence_factor: float

    @property
    def energy_mj(self) -> int:
        return self.prefill_mj + self.decode_mj

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSums:
    """What the replicas' ledgers divided of their meters: request + idle + unattributed == meter."""

    model: str
    source: str
    meter_mj: int
    request_mj: int
    idle_mj: int
    unattributed_mj: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A span of time. Idle energy belongs to models, not to tenants."""

    requests: tuple[RequestSums, ...]
    models: tuple[ModelSums, ...]
