"""The shape of a model: the numbers a decoder needs, as plain values.

Three architectures are served; Granite's multipliers are numbers here, 1.0 for Llama, so the decoder has one
skeleton. Read from a checkpoint by `config_file.py`, once per replica, and handed to its ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding. `factor` 1.0 is plain RoPE; else Llama 3's stretch of the slow frequencies."""

    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_tokens: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything the decoder knows about a model. `num_experts` 0: dense.

    `ffn_size` is the hidden size of the dense MLP, or of one expert. `attention_scale` multiplies q·k;
    logits are divided by `logits_divisor`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    num_experts: int
    experts_per_token: int
    norm_eps: float
    rope: RopeSpec
    is_head_tied: bool
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    attention_scale: float
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelSpec:
        """The inverse of `asdict` and JSON; an unknown or missing key is a TypeError that names it."""
        rope, eos_token_ids = RopeSpec(**fields["rope"]), tuple(fields["eos_token_ids"])
        return cls(**{**fields, "rope": rope, "eos_token_ids": eos_token_ids})
