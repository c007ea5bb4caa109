"""What the ledger store takes in and gives out. Plain data: no SQL, no protobuf.

Energies are integer millijoules. Measured and estimated ones are told apart by `source` and never added up.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BilledEnergy:
    """The settled joules of one request; `static_mj` and `wasted_mj` are parts of prefill + decode.

    `host_mj` is beside them: its part of what the hosts around the devices drew; None: unknown.
    """

    prefill_mj: int
    decode_mj: int
    static_mj: int
    wasted_mj: int
    source: str
    method: str
    confidence_factor: float
    is_final: bool
    host_mj: int | None = None


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
    """Running sums of one life of a replica: request + idle + unattributed == meter.

    Beside the meter: `host_request_mj` is a part of `host_meter_mj`, what the host drew; 0: unknown.
    """

    replica_id: str
    epoch: int
    model: str
    source: str
    at_s: float
    meter_mj: int
    request_mj: int
    idle_mj: int
    unattributed_mj: int
    host_meter_mj: int = 0
    host_request_mj: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSums:
    """Closed requests of one tenant, model and source. `source` empty: those whose energy is unknown.

    `host_mj` is of the `num_host` requests of which it is known.
    """

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
    host_mj: int
    num_host: int
    worst_confidence_factor: float

    @property
    def energy_mj(self) -> int:
        return self.prefill_mj + self.decode_mj

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSums:
    """What the replicas' ledgers divided of their meters: request + idle + unattributed == meter.

    Beside the meter, as in `ReplicaSums`: what the hosts drew, and the requests' part of it.
    """

    model: str
    source: str
    meter_mj: int
    request_mj: int
    idle_mj: int
    unattributed_mj: int
    host_meter_mj: int = 0
    host_request_mj: int = 0

    @property
    def host_rest_mj(self) -> int:
        return self.host_meter_mj - self.host_request_mj


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A span of time. Idle energy belongs to models, not to tenants."""

    requests: tuple[RequestSums, ...]
    models: tuple[ModelSums, ...]
