"""`wattline.yaml`: the one configuration file, and the only reader of files and environment for settings.

Unknown keys are refused. An error names the key, the value, the limit and the fix. Paths are relative to
the file that names them. `load_config` is called by the command line and by `cluster.app:build`.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from replicas.config import DTYPES, EngineLimits, NullEngineConfig, ParallelConfig


class ConfigError(ValueError):
    """The configuration cannot be used; the text has one line per problem, each with key, value and fix."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ParallelSection(Section):
    """How many ranks share one replica of a model. One rank is one device."""

    tensor: int = Field(1, ge=1, le=64, description="ranks that split every attention and dense layer")
    expert: int = Field(1, ge=1, le=64, description="ranks that split the experts of a MoE model")
    layout: Literal["shared"] = Field("shared", description="every rank runs the whole step")

    @model_validator(mode="after")
    def _degrees_make_a_group(self) -> ParallelSection:
        self.to_parallel()
        return self

    def to_parallel(self) -> ParallelConfig:
        return ParallelConfig(tensor=self.tensor, expert=self.expert, layout=self.layout)


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
    """Bounds of one replica of a model. `EngineLimits` says what each means."""

    max_sequences: int = Field(64, ge=1, le=4096)
    max_waiting: int = Field(1024, ge=1, le=65536)
    step_tokens: int = Field(512, ge=16, le=65536)
    block_tokens: int = Field(16, ge=1, le=1024)
    num_blocks: int = Field(0, ge=0)
    kv_cache_mib: int = Field(256, ge=1)
    context_tokens: int = Field(0, ge=0)
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
            context_tokens=self.context_tokens,
            lookahead=lookahead,
            prefix_caching=self.prefix_caching,
        )


class SloSection(Section):
    """What an answer should keep. Only reported: nothing is refused for it."""

    ttft_ms: float | None = Field(None, gt=0.0, description="arrival to first token")
    tpot_ms: float | None = Field(None, gt=0.0, description="mean time of each later token")


class NullSection(Section):
    """The null engine (`source: "null"`), for trials without a model. See `NullEngineConfig`."""

    step_ms: float = Field(5.0, ge=0.0)
    prefill_tokens_per_s: float = Field(50_000.0, gt=0.0)
    vocab_size: int = Field(32_000, ge=16)
    context_tokens: int = Field(8192, ge=16)
    eos_every: int = Field(0, ge=0)
    fail_at_step: int = Field(0, ge=0)
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
    parallel: ParallelSection = ParallelSection()
    replicas: ReplicasSection = ReplicasSection()
    limits: LimitsSection = LimitsSection()
    slo: SloSection = SloSection()
    null_engine: NullSection = NullSection()
    threads_per_rank: int = Field(1, ge=1, le=256)
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

    @property
    def is_null(self) -> bool:
        return self.source == "null"


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


class RouterSection(Section):
    """Addresses are loopback unless told otherwise. Port 0 takes a free one."""

    host: str = "127.0.0.1"
    grpc_port: int = Field(50051, ge=0, le=65535)
    http_port: int = Field(8100, ge=0, le=65535)
    link_host: str = "127.0.0.1"
    link_port: int = Field(50052, ge=0, le=65535)
    link_addresses: tuple[str, ...] = Field(
        (), description="what replicas dial; empty: link_host:link_port of the router that `up` starts"
    )
    max_prompt_bytes: int = Field(1 << 20, ge=1024)
    max_streams: int = Field(2048, ge=1, description="streams in flight per router; more are refused")
    tokenizer_threads: int = Field(2, ge=1, le=64)
    stall_buffer_bytes: int = Field(1 << 20, ge=4096, description="held for a reader that does not read")
    energy_record_count: int = Field(4096, ge=1, description="finished requests GetEnergy remembers")
    failover: FailoverSection = FailoverSection()


class TelemetrySection(Section):
    otlp_endpoint: str = Field("", description="gRPC OTLP endpoint; empty: no trace leaves the machine")
    otlp_insecure: bool = True
    service_name: str = "wattline"
    sample_ratio: float = Field(1.0, ge=0.0, le=1.0)


class EnergySection(Section):
    meter: Literal["auto", "nvml", "cpu-model", "fake"] = "auto"
    poll_ms: float = Field(30.0, ge=5.0, le=1000.0)
    cpu_static_w: float = Field(10.0, ge=0.0, description="cpu-model: drawn whatever the work")
    cpu_core_w: float = Field(8.0, ge=0.0, description="cpu-model: drawn by a busy core on top")


class RaySection(Section):
    address: str = Field("", description="empty: `up` owns a local Ray; `auto` or host:port joins one")
    auth_mode: Literal["auto", "disabled", "token"] = Field(
        "auto",
        description="auto: a token of its own for the Ray `up` owns; RAY_AUTH_MODE for a joined one",
    )
    object_store_mib: int = Field(128, ge=80)


class Config(Section):
    models: tuple[ModelSection, ...] = Field(min_length=1, max_length=64)
    router: RouterSection = RouterSection()
    telemetry: TelemetrySection = TelemetrySection()
    energy: EnergySection = EnergySection()
    ray: RaySection = RaySection()
    runtime_dir: str = Field(
        "", description="sockets, pid and log files; empty: a folder per user under /tmp"
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        names = [model.name for model in self.models]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"models: name {doubled[0]!r} is used twice; give each model its own")
        return self

    def model(self, name: str) -> ModelSection:
        """The section of model `name`; KeyError if there is none."""
        return {section.name: section for section in self.models}[name]


def default_runtime_dir() -> Path:
    """Where sockets, pid and log files go when nothing is said: short, since Unix socket paths are."""
    return Path(os.environ.get("WATTLINE_RUNTIME_DIR") or f"/tmp/wattline-{os.getuid()}")


def load_config(path: Path) -> Config:
    """Read and validate a YAML file.

    Raises ConfigError naming every wrong key with its value and fix.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a file with -f") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds no mapping; start with `models:`")
    return resolve_paths(parse_config(raw, origin=str(path)), base=path.resolve().parent)


def parse_config(raw: dict[str, Any], *, origin: str = "config") -> Config:
    """Validate plain data. Raises ConfigError."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = [dict(problem) for problem in error.errors()]
        lines = [_explain(problem) for problem in problems if not _is_echo(problem)]
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from error


def resolve_paths(config: Config, *, base: Path) -> Config:
    """Make relative checkpoint folders absolute; hub ids and `null` stay as they are."""
    models = tuple(
        section.model_copy(
            update={
                "source": _resolve_source(section.source, base),
                "tokenizer": _resolve_source(section.tokenizer, base),
            }
        )
        for section in config.models
    )
    runtime_dir = config.runtime_dir or str(default_runtime_dir())
    return config.model_copy(update={"models": models, "runtime_dir": str(base / runtime_dir)})


def _resolve_source(source: str, base: Path) -> str:
    if not source or source == "null":
        return source
    folder = base / Path(source).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path:
        raise ConfigError(
            f"models.source: {source!r} is no folder (looked at {folder}); fix the path or give a hub id"
        )
    return source


ALLOWED = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "above {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "below {lt}",
    "too_short": "{min_length} entries or more",
    "too_long": "{max_length} entries or fewer",
    "string_too_short": "{min_length} characters or more",
    "string_too_long": "{max_length} characters or fewer",
    "string_pattern_mismatch": "letters, digits and . _ / -, the first a letter or digit",
    "string_type": "a text; put it in quotes",
    "literal_error": "{expected}",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "tuple_type": "a list; begin each entry with `- `",
    "model_type": "keys with values, as `key: value`",
}
"""What a key may hold, by the name pydantic gives the mistake."""
MAX_SHOWN_CHARS = 60


def _is_echo(problem: dict[str, Any]) -> bool:
    """A model that is wrong is named by itself; that the list without it is too short says nothing new."""
    return problem["type"] == "too_short" and bool(problem["input"])


def _explain(problem: dict[str, Any]) -> str:
    """One sentence: key, value, limit and fix."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])[1:]
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(problem["loc"][-1]), _all_keys(), n=1)
        return f"{key}: unknown key; " + (f"did you mean {close[0]!r}?" if close else "remove it")
    if kind == "missing":
        return f"{key}: is missing; add it"
    if kind == "value_error":
        return f"{key}: {context['error']}" if key else str(context["error"])
    got = repr(problem["input"])
    got = got if len(got) <= MAX_SHOWN_CHARS else f"{got[:MAX_SHOWN_CHARS]}..."
    allowed = ALLOWED[kind].format_map(context) if kind in ALLOWED else problem["msg"]
    return f"{key}: got {got}; allowed: {allowed}"


def _all_keys() -> set[str]:
    return {name for section in Section.__subclasses__() for name in section.model_fields}
