"""`models[]`: what is served, on how many ranks, within which bounds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cluster.config.section import Section
from replicas.attention_choice import check_attention
from replicas.config import DTYPES, EngineLimits, NullEngineConfig, ParallelConfig


class ParallelSection(Section):
    """How many ranks share one replica of a model. One rank is one device."""

    tensor: int = Field(1, ge=1, le=64, description="ranks that split every attention and dense layer")
    expert: int = Field(1, ge=1, le=64, description="ranks that split the experts of a MoE model")
    layout: Literal["shared", "dispatch"] = Field(
        "shared",
        description="shared: every rank runs every sequence; dispatch: each rank has sequences and a KV "
        "cache of its own and shares the experts alone (a MoE model, tensor 1, expert = ranks)",
    )

    spare_experts: int = Field(
        0, ge=0, le=256, description="slots per rank and layer for copies of hot experts of other ranks"
    )
    rebalance_steps: int = Field(1000, ge=1, description="steps after which copies are looked at again")
    hosts: int = Field(1, ge=1, le=64, description="nodes that the ranks of one replica are divided over")

    @model_validator(mode="after")
    def _degrees_make_a_group(self) -> ParallelSection:
        self.to_parallel()
        return self

    def to_parallel(self) -> ParallelConfig:
        return ParallelConfig(**self.model_dump())


class ReplicasSection(Section):
    min: int = Field(1, ge=1, le=1000)
    max: int = Field(1, ge=1, le=1000)

    @model_validator(mode="after")
    def _max_is_not_below_min(self) -> ReplicasSection:
        if self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}; raise max")
        return self


LEAST_OF_LIMIT = {"num_blocks": 2, "context_tokens": 16}
"""Below it no engine starts: a block is scratch, and a replica is ready when it has generated some tokens."""


class LimitsSection(Section):
    """Bounds of one lane of a replica (`dispatch` has one per rank). `EngineLimits` says what each means."""

    max_sequences: int = Field(64, ge=1, le=4096)
    max_waiting: int = Field(1024, ge=1, le=65536)
    max_queued: int = Field(1024, ge=1, le=65536, description="waiting in a router; more are refused")
    max_queue_s: float = Field(30.0, gt=0.0, le=3600.0, description="how long one may wait there")
    step_tokens: int = Field(512, ge=16, le=65536)
    block_tokens: int = Field(16, ge=1, le=1024)
    num_blocks: int = Field(0, ge=0)
    kv_cache_mib: int = Field(0, ge=0, description="per rank; 0: 256 on a CPU, what a GPU has left on CUDA")
    gpu_memory_ratio: float = Field(0.9, gt=0.0, le=1.0, description="of a GPU that a rank may use in all")
    cuda_graphs: bool = Field(True, description="replay decode steps from CUDA graphs")
    context_tokens: int = Field(0, ge=0)
    decode_stretch: float = Field(
        2.0, ge=1.0, le=1000.0, description="how much longer prompts may make the steps of those that decode"
    )
    prefix_caching: bool = Field(True, description="share the KV of prompts that begin the same")
    max_output_tokens: int = Field(4096, ge=1)
    drain_s: float = Field(30.0, ge=1.0, le=3600.0)
    ready_timeout_s: float = Field(600.0, ge=5.0)

    @field_validator("num_blocks", "context_tokens")
    @classmethod
    def _zero_or_enough(cls, value: int, info: ValidationInfo) -> int:
        least = LEAST_OF_LIMIT[str(info.field_name)]
        if 0 < value < least:
            raise ValueError(f"got {value}; allowed: {least} or more, or 0 for what fits; raise it")
        return value

    def to_engine(self, *, lookahead: int) -> EngineLimits:
        return EngineLimits(
            max_sequences=self.max_sequences,
            max_waiting=self.max_waiting,
            step_tokens=self.step_tokens,
            block_tokens=self.block_tokens,
            num_blocks=self.num_blocks,
            kv_cache_bytes=self.kv_cache_mib * 2**20,
            gpu_memory_ratio=self.gpu_memory_ratio,
            cuda_graphs=self.cuda_graphs,
            context_tokens=self.context_tokens,
            lookahead=lookahead,
            decode_stretch=self.decode_stretch,
            prefix_caching=self.prefix_caching,
        )


class SloSection(Section):
    """What an answer should keep: the balancer plans for it, and routers refuse what would miss it."""

    ttft_ms: float | None = Field(None, gt=0.0, description="arrival to first token")
    tpot_ms: float | None = Field(None, gt=0.0, description="mean time of each later token")
    refuse_late: bool = Field(
        True, description="refuse at once what would wait too long for ttft_ms; false: only report"
    )


class NullSection(Section):
    """The null engine (`source: "null"`), for trials without a model. See `NullEngineConfig`."""

    step_ms: float = Field(5.0, ge=0.0)
    prefill_tokens_per_s: float = Field(50_000.0, gt=0.0)
    vocab_size: int = Field(32_000, ge=16)
    context_tokens: int = Field(8192, ge=16)
    eos_every: int = Field(0, ge=0)
    fail_at_step: int = Field(0, ge=0)
    fail_at_token: int = Field(0, ge=0)
    hang_at_step: int = Field(0, ge=0)
    power_w: float = Field(400.0, ge=0.0)
    idle_power_w: float = Field(80.0, ge=0.0)

    def to_null(self) -> NullEngineConfig:
        return NullEngineConfig(**self.model_dump())


class ModelSection(Section):
    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    source: str = Field(min_length=1, description="a checkpoint folder, a Hugging Face hub id, or null")
    revision: str = Field("main", description="of a hub id")
    tokenizer: str = Field("", description="a tokenizer folder or hub id; empty: the source")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: str = "auto"
    quantization: Literal["none", "int8"] = Field(
        "none", description="int8: weights in bytes, a factor per row; CPUs only"
    )
    parallel: ParallelSection = ParallelSection()
    replicas: ReplicasSection = ReplicasSection()
    limits: LimitsSection = LimitsSection()
    slo: SloSection = SloSection()
    balancing: Literal["energy", "prefix", "least_loaded", "p2c", "round_robin"] = Field(
        "energy", description="which replica takes a request; see cluster/balancing/decision.py"
    )
    null_engine: NullSection = NullSection()
    threads_per_rank: int = Field(1, ge=1, le=256)
    kernels: Literal["auto", "float32", "off"] = Field(
        "auto", description="compiled CPU kernels: what they keep weights in, or off for torch"
    )
    attention: Literal["auto", "triton", "varlen"] = Field(
        "auto",
        description="who attends on a GPU: our kernels, torch's varlen, or the faster at the start",
    )
    cpus_per_rank: float = Field(1.0, gt=0.0, description="logical CPUs a rank reserves in Ray")

    @field_validator("source", mode="before")
    @classmethod
    def _source_is_a_word(cls, value: object) -> object:
        if value is None:
            raise ValueError(
                'is empty; give a folder or hub id, or "null" in quotes for the engine without a model'
            )
        return value

    @field_validator("dtype")
    @classmethod
    def _dtype_is_known(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"{value!r} is no dtype; one of {', '.join(DTYPES)}")
        return value

    @model_validator(mode="after")
    def _bytes_are_for_cpus(self) -> ModelSection:
        if self.quantization != "none" and self.device == "cuda":
            raise ValueError("quantization int8 is served on CPUs alone; set device to cpu, or remove it")
        return self

    @model_validator(mode="after")
    def _lanes_are_for_cpus(self) -> ModelSection:
        parallel = self.parallel
        if (parallel.layout == "dispatch" or parallel.spare_experts) and self.device == "cuda":
            raise ValueError(
                "parallel.layout dispatch and parallel.spare_experts run on CPU ranks only; set layout to "
                "shared and spare_experts to 0, or device to cpu"
            )
        return self

    @model_validator(mode="after")
    def _attention_can_be(self) -> ModelSection:
        check_attention(
            self.attention,
            device=self.device,
            dtype=self.dtype,
            kernels=self.kernels,
            block_tokens=self.limits.block_tokens,
        )
        return self

    @property
    def is_null(self) -> bool:
        return self.source == "null"
