"""What one replica is told: frozen sections, validated where they are made. Reads no file, no environment."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace

from replicas.attention_choice import check_attention
from replicas.errors import BadParallelism
from replicas.models.spec import ModelSpec

LAYOUTS = ("shared", "dispatch")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KERNELS = ("auto", "float32", "off")
"""The compiled CPU kernels of float32 models. `auto`: matrices whose values are all bfloat16 are kept in half
the bytes and widened exactly; `float32`: kept as floats; `off`, or no compiler: torch."""
QUANTIZATIONS = ("none", "int8")
"""`int8`: all matrices but embedding and router in bytes, with a factor per row (`layers/quantize.py`)."""
HOST_KV_BYTES = 256 * 2**20
METERS = ("auto", "nvml", "rapl", "zeus", "cpu-model", "fake")
HOST_METERS = ("auto", "off", "rapl")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Degrees of a group, and how its ranks share the work of a step.

    Ranks = max(tensor, expert): attention is split over `tensor` ranks and experts over `expert` ranks, so
    each must be 1 or the number of ranks. In the `shared` layout all ranks run every sequence. Example:
    `tensor=2, expert=2` is two ranks, each with half of every attention layer and half of the experts;
    `tensor=1, expert=2` replicates attention. In the `dispatch` layout every rank has sequences and a KV
    cache of its own, its lane; only what the experts see goes to all ranks and back. It needs `tensor=1`.
    With `hosts` above 1 the first ranks / hosts of the ranks are on the first host, and so on.
    """

    tensor: int = 1
    expert: int = 1
    layout: str = "shared"
    spare_experts: int = 0
    """Slots per rank and layer for copies of hot experts that live on other ranks."""
    rebalance_steps: int = 1000
    """Steps after which the copies of a layer are looked at again."""
    hosts: int = 1
    """Machines that the ranks are divided evenly over."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise BadParallelism(f"parallel.layout is {self.layout!r}; served here: {', '.join(LAYOUTS)}")
        if self.tensor < 1 or self.expert < 1:
            raise BadParallelism(f"parallel.tensor={self.tensor}, parallel.expert={self.expert}; at least 1")
        if self.tensor not in (1, self.num_ranks) or self.expert not in (1, self.num_ranks):
            raise BadParallelism(
                f"parallel.tensor={self.tensor} and parallel.expert={self.expert} make no group: "
                "with both above 1 they must be equal"
            )
        if self.layout == "dispatch" and (self.tensor > 1 or self.expert == 1):
            raise BadParallelism(
                f"parallel.layout is 'dispatch' with tensor={self.tensor} and expert={self.expert}; "
                "it splits experts alone: set tensor to 1 and expert to the number of ranks, 2 or more"
            )
        if self.spare_experts < 0 or (self.spare_experts and self.expert == 1) or self.rebalance_steps < 1:
            raise BadParallelism(
                f"parallel.spare_experts={self.spare_experts}, rebalance_steps={self.rebalance_steps}, "
                f"expert={self.expert}: spare slots are 0 or more, 0 where expert is 1; steps are at least 1"
            )
        if self.hosts < 1 or self.num_ranks % self.hosts:
            fitting = [str(hosts) for hosts in range(1, self.num_ranks + 1) if self.num_ranks % hosts == 0]
            raise BadParallelism(
                f"parallel.hosts={self.hosts} with {self.num_ranks} ranks: hosts have equally many; "
                f"set hosts to one of {', '.join(fitting)}, or change tensor and expert"
            )

    @property
    def num_ranks(self) -> int:
        return max(self.tensor, self.expert)

    @property
    def ranks_per_host(self) -> int:
        return self.num_ranks // self.hosts

    @property
    def num_lanes(self) -> int:
        """Lanes of the scheduler: sets of sequences that have a KV cache of their own."""
        return self.num_ranks if self.layout == "dispatch" else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds of one lane of an engine; the `shared` layout has one lane, `dispatch` one per rank.

    `num_blocks` 0: from `kv_cache_bytes` per rank. `kv_cache_bytes` 0: on a CUDA device what
    `gpu_memory_ratio` of its memory leaves beside weights and steps, elsewhere 256 MiB.
    """

    max_sequences: int = 64
    max_waiting: int = 1024
    """Requests beyond `max_sequences` that are held; more are refused."""
    step_tokens: int = 512
    block_tokens: int = 16
    num_blocks: int = 0
    kv_cache_bytes: int = 0
    gpu_memory_ratio: float = 0.9
    cuda_graphs: bool = True
    """Replay decode steps from graphs, on CUDA devices whose kernels allow it."""
    context_tokens: int = 0
    """Longest prompt plus output; 0: what the model allows."""
    lookahead: int = 0
    """Steps planned before the tokens of the last one are known; `lookahead_on` says what suits a device."""
    decode_stretch: float = 2.0
    """How much longer prompts may make the steps of those that decode (`engine/prefill_pace.py`)."""
    prefix_caching: bool = True
    """Keep the KV of finished prompts and answers, and share it with whatever begins the same."""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_waiting", "step_tokens", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits.{name} is {getattr(self, name)}; at least 1")
        if self.decode_stretch < 1:
            raise ValueError(f"limits.decode_stretch is {self.decode_stretch}; at least 1")
        if self.lookahead not in (0, 1):
            raise ValueError(f"limits.lookahead is {self.lookahead}; 0 or 1")
        if not 0.0 < self.gpu_memory_ratio <= 1.0:
            raise ValueError(f"limits.gpu_memory_ratio is {self.gpu_memory_ratio}; above 0, at most 1")

    @property
    def has_fixed_cache(self) -> bool:
        """Whether the size of the KV cache is configured, not found from the device."""
        return bool(self.num_blocks or self.kv_cache_bytes)

    @property
    def host_kv_bytes(self) -> int:
        """Bytes of the KV cache of a rank whose memory is not a device's of its own."""
        return self.kv_cache_bytes or HOST_KV_BYTES


def lookahead_on(device: str) -> int:
    """A GPU has its next step queued while the host reads the last; a CPU computes on the same cores."""
    return 1 if device.startswith("cuda") else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NullEngineConfig:
    """The engine without a model: token = hash(prompt, position). For tests of everything around it.

    `fail_at_step` raises in a step, `fail_at_token` in the step that is given this token, `hang_at_step`
    never returns from it, 0: never. `power_w` is what its fake meter draws while a step runs, `idle_power_w`
    otherwise.
    """

    step_ms: float = 5.0
    prefill_tokens_per_s: float = 50_000.0
    vocab_size: int = 32_000
    context_tokens: int = 8192
    eos_every: int = 0
    """An end-of-sequence token (id 2) about once in this many tokens; 0: never."""
    fail_at_step: int = 0
    fail_at_token: int = 0
    hang_at_step: int = 0
    power_w: float = 400.0
    idle_power_w: float = 80.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a group over hosts meet: an address of rank 0's host and two ports open there.

    `plan_fd` and `store_fd` are the listeners themselves, in the process of rank 0; -1 for the others.
    """

    host: str
    plan_port: int
    store_port: int
    plan_fd: int = -1
    store_fd: int = -1

    def told_to(self, rank: int) -> Rendezvous:
        return self if rank == 0 else replace(self, plan_fd=-1, store_fd=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """All one rank process needs. `source` is a checkpoint folder and `spec` what its config says, or
    `source` is the word `null` and `spec` None.

    `socket_path` (rank 0 only) is where the supervisor listens. `shared_dir` is on the shared-memory file
    system; every file there is named by `group` and `epoch` and unlinked once all ranks are attached.
    `rendezvous` is where a group over hosts meets; None: all ranks share a host.
    """

    group: str
    epoch: int
    rank: int
    source: str
    parallel: ParallelConfig
    limits: EngineLimits
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 1
    kernels: str = "auto"
    attention: str = "auto"
    """`attention_choice.py` says who attends on a GPU, and what can be asked for."""
    quantization: str = "none"
    socket_path: str = ""
    shared_dir: str = "/dev/shm"
    spec: ModelSpec | None = None
    rendezvous: Rendezvous | None = None
    null: NullEngineConfig = field(default_factory=NullEngineConfig)
    attach_timeout_s: float = 60.0
    collective_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels is {self.kernels!r}; one of {', '.join(KERNELS)}")
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization is {self.quantization!r}; one of {', '.join(QUANTIZATIONS)}")
        if self.quantization != "none" and not self.device.startswith("cpu"):
            raise ValueError(
                f"quantization {self.quantization} is served on CPUs alone; device is {self.device!r}"
            )
        check_attention(
            self.attention,
            device=self.device,
            dtype=self.dtype,
            kernels=self.kernels,
            block_tokens=self.limits.block_tokens,
        )
        parallel = self.parallel
        if (parallel.layout == "dispatch" or parallel.spare_experts) and not self.device.startswith("cpu"):
            raise BadParallelism(
                f"parallel.layout={parallel.layout!r}, spare_experts={parallel.spare_experts} on device "
                f"{self.device!r}: dispatch and spare experts run on CPU ranks only; "
                "set layout to shared and spare_experts to 0, or device to cpu"
            )

    @property
    def num_ranks(self) -> int:
        return self.parallel.num_ranks

    @property
    def local_rank(self) -> int:
        """Its place among the ranks of its host."""
        return self.rank % self.parallel.ranks_per_host


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCredentials:
    """What a replica shows routers, and what it asks of them: paths of PEM files.

    `server_name`: the name in the router's certificate; empty: the dialled address.
    """

    ca: str
    cert: str
    key: str
    server_name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsAccess:
    """Where the /metrics of a process listens, and how. Paths are of PEM files; without `cert`: plain text.

    `announced_host` is what scrapers dial; empty: `host`. With `client_ca` they must show a certificate.
    """

    host: str = "127.0.0.1"
    announced_host: str = ""
    cert: str = ""
    key: str = ""
    client_ca: str = ""

    def address(self, port: int) -> str:
        """host:port for scrapers; https://host:port over TLS."""
        host = self.announced_host or self.host
        return f"{'https://' if self.cert else ''}{f'[{host}]' if ':' in host else host}:{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """All one supervisor needs to run a replica of `model`.

    `routers` are `host:port` link addresses; a DNS name is resolved again at each dial.
    `energy_agent` is a gRPC target (`unix:/path` or `host:port`) of the host's energy agent; those of other
    hosts where the group has ranks are at `energy_agent_port`.
    """

    model: str
    source: str
    replica_id: str
    routers: tuple[str, ...]
    link_credentials: LinkCredentials | None = None
    """None: routers are dialled in plain text."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    limits: EngineLimits = field(default_factory=EngineLimits)
    null: NullEngineConfig = field(default_factory=NullEngineConfig)
    device: str = "cpu"
    dtype: str = "auto"
    threads_per_rank: int = 1
    kernels: str = "auto"
    attention: str = "auto"
    quantization: str = "none"
    runtime_dir: str = "/tmp"
    shared_dir: str = "/dev/shm"
    energy_agent: str = ""
    energy_agent_port: int = 0
    meter: str = "auto"
    metrics: MetricsAccess = field(default_factory=MetricsAccess)
    drain_s: float = 30.0
    ready_timeout_s: float = 600.0
    stall_floor_s: float = 2.0
    """A step longer than max(this, 5 x its p99) is a hang."""


def rank_config_to_json(config: RankConfig) -> str:
    """What `python -m replicas.rank.main --config` takes."""
    return json.dumps(asdict(config))


def rank_config_from_json(text: str) -> RankConfig:
    """The inverse of `rank_config_to_json`; an unknown or missing key is a TypeError that names it."""
    fields = json.loads(text)
    fields["parallel"] = ParallelConfig(**fields["parallel"])
    fields["limits"] = EngineLimits(**fields["limits"])
    fields["null"] = NullEngineConfig(**fields["null"])
    fields["spec"] = fields["spec"] and ModelSpec.from_fields(fields["spec"])
    if fields.get("rendezvous"):
        fields["rendezvous"] = Rendezvous(**fields["rendezvous"])
    return RankConfig(**fields)
