"""What a router answers, as plain data: for commands, demos and examples that want no protobuf.

`client.py` fills these; `None` means the router does not know.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    wasted_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """One request's share of the metered energy of the devices that served it.

    `host_j` is beside the total: its share of the hosts around them, by a meter of `host_source`.
    """

    total_j: float | None
    prefill_j: float | None
    decode_j: float | None
    static_j: float | None
    joules_per_output_token: float | None
    joules_per_total_token: float | None
    source: str
    method: str
    window_ms: float
    confidence_factor: float
    is_final: bool
    host_j: float | None = None
    host_source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What the model gave a token: natural logarithms. `top`: (token id, logprob), likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of an answer. `finish_reason` ("stop" or "length") is set on the last piece alone.

    `logprobs` is parallel to `token_ids` where asked for, else empty. `index`: of several choices.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """The end of an answer: what it took. `resumed_at`: token offsets where another replica went on."""

    request_id: str
    trace_id: str
    usage: Usage
    timing: Timing
    energy: Energy
    resumed_at: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model as clients see it."""

    name: str
    architecture: str
    context_tokens: int
    max_output_tokens: int
    ready_replicas: int
    has_chat: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """`address`: of its node, where that is not the supervisor's; the pid is one there."""

    rank: int
    pid: int
    device: str
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEvent:
    """Something that happened to a replica, and why. `replica_id` empty: to all of the model."""

    model: str
    replica_id: str
    kind: str
    reason: str
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """One attached replica. `state`: ready, draining or stalled; `last_event`: how it came to be so."""

    replica_id: str
    state: str
    epoch: int
    architecture: str
    tensor_parallel: int
    expert_parallel: int
    device: str
    dtype: str
    kernels: str
    quantization: str
    energy_source: str
    host: str
    supervisor_pid: int
    metrics_address: str
    ranks: tuple[RankState, ...]
    requests_in_flight: int
    attached_s: float
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    step_ms: float
    decode_tokens_per_s: float
    power_w: float | None
    last_event: FleetEvent | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    p50: float
    p95: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """Millijoules of one source: prefill + decode + idle + unattributed == meter."""

    source: str
    confidence_factor: float
    meter_mj: int
    prefill_mj: int
    decode_mj: int
    idle_mj: int
    unattributed_mj: int
    static_mj: int
    wasted_mj: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerState:
    """The same division now, in watts."""

    meter_w: float
    prefill_w: float
    decode_w: float
    idle_w: float
    unattributed_w: float
    static_w: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HostState:
    """What the hosts drew beside the devices: requests + rest == meter. `power_w` None: unknown now."""

    meter_mj: int
    requests_mj: int
    power_w: float | None

    @property
    def rest_mj(self) -> int:
        return self.meter_mj - self.requests_mj


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertState:
    """How the experts of a model are loaded. Imbalance: busiest rank over the mean; None on one rank."""

    imbalance: float | None
    imbalance_without_copies: float | None
    num_copies: int
    num_ranks: int
    hottest_load: float
    hottest_layer: int
    hottest_expert: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestState:
    """One request that ended. `outcome`: a finish reason, `cancelled`, or the name of a gRPC status."""

    request_id: str
    trace_id: str
    model: str
    age_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_ms: float | None
    total_ms: float
    energy_mj: int | None
    is_final: bool
    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """One model as operators see it; joules per token are None where none ended in the last 30 s.

    `host` None: no host is metered.
    """

    name: str
    min_replicas: int
    max_replicas: int
    active_requests: int
    waiting_requests: int
    output_tokens_per_s: float
    joules_per_output_token: float | None
    energy_source: str
    replicas: tuple[ReplicaState, ...]
    joules_per_total_token: float | None = None
    ttft_ms: Latency | None = None
    tpot_ms: Latency | None = None
    slo_met: int = 0
    slo_missed: int = 0
    ledger: tuple[LedgerState, ...] = ()
    power: PowerState | None = None
    experts: ExpertState | None = None
    host: HostState | None = None

    @property
    def num_ready(self) -> int:
        return sum(replica.state == "ready" for replica in self.replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterState:
    router_id: str
    version: str
    uptime_s: float
    models: tuple[ModelState, ...]
    last_requests: tuple[RequestState, ...] = ()
    events: tuple[FleetEvent, ...] = ()
