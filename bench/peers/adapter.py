"""What every peer is told, what it offers, and where its adapter is. Standard library only."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

STEP_TOKENS = 2048
MAX_SEQUENCES = 64
KV_BLOCK_TOKENS = 32
KV_CACHE_BYTES = 2**30
"""For every engine, ours too."""
UNCACHED = "-uncached"
"""Ends the name of a peer that runs without its prefix cache."""

ADAPTERS = {
    "vllm": "bench.peers.vllm",
    "openvino": "bench.peers.openvino",
    "llamacpp": "bench.peers.llamacpp",
    "transformers": "bench.peers.transformers",
    "transformers-static": "bench.peers.transformers_static",
}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Emit = Callable[[int, Sequence[int], bool], None]
"""(request_id, new token ids, is_finished): called as soon as the tokens are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSetup:
    """One peer on one checkpoint. `converted` is the folder of copies in a peer's own format."""

    name: str
    model: str
    dtype: str
    threads: int
    context_tokens: int
    converted: str

    def __post_init__(self) -> None:
        if self.adapter not in ADAPTERS:
            known = ", ".join(ADAPTERS)
            raise ValueError(f"peer {self.name!r} is not known; one of {known}, each also with {UNCACHED}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype is {self.dtype!r}; one of {', '.join(DTYPE_BYTES)}")

    @property
    def adapter(self) -> str:
        return self.name.removesuffix(UNCACHED)

    @property
    def prefix_caching(self) -> bool:
        return not self.name.endswith(UNCACHED)

    @property
    def kv_tokens(self) -> int:
        """How many tokens of this model `KV_CACHE_BYTES` hold, and no more than all sequences can have."""
        config = json.loads((Path(self.model) / "config.json").read_text())
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        width = int(config.get("num_key_value_heads") or heads) * head_dim
        token_bytes = 2 * int(config["num_hidden_layers"]) * width * DTYPE_BYTES[self.dtype]
        return min(KV_CACHE_BYTES // token_bytes, MAX_SEQUENCES * self.context_tokens)

    def converted_path(self, suffix: str) -> Path:
        """Where a converted copy of this checkpoint lives: another path or other weights, another name."""
        source = Path(self.model).resolve()
        weights = sorted((one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in source.glob("*"))
        digest = hashlib.sha256(repr((str(source), weights)).encode()).hexdigest()[:8]
        return Path(self.converted) / f"{source.name}-{self.dtype}-{digest}{suffix}"


class Peer(Protocol):
    """An engine that its caller steps. `version` names the engine and what it runs on.

    `has_prefix_cache`: prompts that begin alike are computed once. `admits_midway`: a request may join while
    others run; one without it computes a batch to its end.
    """

    version: str
    has_prefix_cache: bool
    admits_midway: bool

    def add(self, request_id: int, prompt: Sequence[int], output_tokens: int) -> None:
        """Queue a greedy request that ignores the end of sequence."""

    def step(self, emit: Emit) -> None:
        """Run once; hand out every new token."""

    def close(self) -> None:
        """Stop what the peer started."""


def open_peer(setup: PeerSetup) -> Peer:
    """Load the peer's engine in this interpreter. Raises what the peer raises."""
    module: Any = importlib.import_module(ADAPTERS[setup.adapter])
    peer: Peer = module.open_peer(setup)
    return peer
