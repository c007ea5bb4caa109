"""Tiny checkpoints, saved by transformers' own classes, and its logits for them as the reference.

Weights are drawn larger than a fresh model's, so that the best logit stands out and greedy tokens vary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}


def make_llama(
    folder: Path,
    *,
    is_tied: bool = False,
    num_kv_heads: int = 4,
    has_llama3_rope: bool = False,
    head_dim: int | None = None,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """A Llama of 515 tokens; `max_shard_size` "100KB" spreads it over several files."""
    rope = LLAMA3_ROPE if has_llama3_rope else {"rope_type": "default", "rope_theta": 10_000.0}
    config = LlamaConfig(
        **_BASE,
        vocab_size=515,
        intermediate_size=96,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=is_tied,
        rope_parameters=rope,
    )
    return _save(LlamaForCausalLM(config), folder, seed=seed, max_shard_size=max_shard_size, dtype=dtype)


def make_granite(folder: Path, *, is_tied: bool = True, seed: int = 0) -> Path:
    """A dense Granite with all four multipliers different from 1."""
    config = GraniteConfig(
        **_BASE,
        **_GRANITE,
        vocab_size=515,
        intermediate_size=96,
        num_key_value_heads=4,
        tie_word_embeddings=is_tied,
    )
    return _save(GraniteForCausalLM(config), folder, seed=seed)


def make_granite_moe(
    folder: Path,
    *,
    vocab_size: int = 49155,
    num_experts: int = 8,
    num_choices: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """A Granite MoE with the odd vocabulary of the published ones."""
    config = GraniteMoeConfig(
        **_BASE,
        **_GRANITE,
        vocab_size=vocab_size,
        intermediate_size=32,
        num_key_value_heads=4,
        num_local_experts=num_experts,
        num_experts_per_tok=num_choices,
        tie_word_embeddings=True,
    )
    return _save(GraniteMoeForCausalLM(config), folder, seed=seed, dtype=dtype)


@torch.inference_mode()
def reference_logits(
    folder: Path, token_ids: list[list[int]], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of every sequence, by transformers in one process; returned in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return [model(torch.tensor([ids])).logits[0].float() for ids in token_ids]


@torch.no_grad()
def _save(
    model: PreTrainedModel,
    folder: Path,
    *,
    seed: int,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1.0 + 0.2 * noise if parameter.dim() == 1 else 0.25 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
