"""The models of the check: exact shapes of published ones, and tiny ones, as transformers' configs.

Weights are random and made on the device; no file and no network is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from replicas.models.spec import ModelSpec, RopeSpec
from replicas.models.weights import ExpertWeights, LayerWeights, MlpWeights, ModelWeights
from replicas.parallel.degrees import Shard

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {
    "vocab_size": 128_256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 515,
}
_TINY_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model by its transformers' config and class."""

    name: str
    config: PretrainedConfig
    model: type[PreTrainedModel]


def served_shapes() -> list[Shape]:
    """Llama-3.2-1B, Llama-3.1-8B and granite-3.0-1b-a400m, number by number."""
    return [
        Shape(
            name="Llama-3.2-1B",
            model=LlamaForCausalLM,
            config=LlamaConfig(
                **_LLAMA,
                hidden_size=2048,
                num_hidden_layers=16,
                intermediate_size=8192,
                head_dim=64,
                tie_word_embeddings=True,
                rope_parameters=_LLAMA3_ROPE | {"factor": 32.0},
            ),
        ),
        Shape(
            name="Llama-3.1-8B",
            model=LlamaForCausalLM,
            config=LlamaConfig(
                **_LLAMA,
                hidden_size=4096,
                num_hidden_layers=32,
                intermediate_size=14_336,
                head_dim=128,
                tie_word_embeddings=False,
                rope_parameters=_LLAMA3_ROPE | {"factor": 8.0},
            ),
        ),
        Shape(
            name="granite-3.0-1b-a400m",
            model=GraniteMoeForCausalLM,
            config=GraniteMoeConfig(
                vocab_size=49_155,
                hidden_size=1024,
                intermediate_size=512,
                num_hidden_layers=24,
                num_attention_heads=16,
                num_key_value_heads=8,
                num_local_experts=32,
                num_experts_per_tok=8,
                max_position_embeddings=4096,
                rms_norm_eps=1e-6,
                embedding_multiplier=12.0,
                residual_multiplier=0.22,
                attention_multiplier=0.015625,
                logits_scaling=6.0,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            ),
        ),
    ]


def small_shapes(*, is_tiny: bool) -> list[Shape]:
    """One of each architecture for right and wrong; a GPU gets more layers and wider heads."""
    grown = {} if is_tiny else {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
    base = _TINY | grown
    llama3 = _LLAMA3_ROPE | {"rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    size = 96 if is_tiny else 1024
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    return [
        Shape(
            name="llama",
            model=LlamaForCausalLM,
            config=LlamaConfig(**base, intermediate_size=size, rope_parameters=llama3),
        ),
        Shape(
            name="granite",
            model=GraniteForCausalLM,
            config=GraniteConfig(**base, **_TINY_GRANITE, intermediate_size=size, rope_parameters=plain),
        ),
        Shape(
            name="granite-moe",
            model=GraniteMoeForCausalLM,
            config=GraniteMoeConfig(
                **base,
                **_TINY_GRANITE,
                intermediate_size=32 if is_tiny else 256,
                num_local_experts=4 if is_tiny else 16,
                num_experts_per_tok=2 if is_tiny else 4,
                rope_parameters=plain,
            ),
        ),
    ]


def spec_of(shape: Shape) -> ModelSpec:
    """The decoder's numbers of a config made here: `read_spec` without the folder."""
    config = shape.config
    is_moe = shape.model is GraniteMoeForCausalLM
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    return ModelSpec(
        architecture=shape.model.__name__,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ffn_size=config.intermediate_size,
        num_experts=config.num_local_experts if is_moe else 0,
        experts_per_token=config.num_experts_per_tok if is_moe else 0,
        norm_eps=config.rms_norm_eps,
        rope=RopeSpec(
            theta=rope["rope_theta"],
            factor=rope.get("factor", 1.0),
            low_freq_factor=rope.get("low_freq_factor", 1.0),
            high_freq_factor=rope.get("high_freq_factor", 4.0),
            original_context_tokens=rope.get("original_max_position_embeddings", 8192),
        ),
        is_head_tied=config.tie_word_embeddings,
        context_tokens=config.max_position_embeddings,
        eos_token_ids=(),
        attention_scale=getattr(config, "attention_multiplier", head_dim**-0.5),
        embedding_multiplier=getattr(config, "embedding_multiplier", 1.0),
        residual_multiplier=getattr(config, "residual_multiplier", 1.0),
        logits_divisor=getattr(config, "logits_scaling", 1.0),
    )


def random_weights(
    spec: ModelSpec, shard: Shard, *, device: torch.device, dtype: torch.dtype
) -> ModelWeights:
    """Weights of one rank, drawn on the device with the variance that keeps activations near 1."""
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        weight = torch.empty(shape, device=device, dtype=dtype)
        return weight.normal_(0.0, shape[-1] ** -0.5, generator=generator)

    hidden, size = spec.hidden_size, shard.ffn_size
    q_rows = shard.num_heads * spec.head_dim
    qkv_rows = q_rows + 2 * shard.num_kv_heads * spec.head_dim
    ones = torch.ones(hidden, device=device, dtype=dtype)

    def ffn() -> MlpWeights | ExpertWeights:
        if not spec.num_experts:
            return MlpWeights(gate_up_2FH=draw(2 * size, hidden), down_HF=draw(hidden, size))
        return ExpertWeights(
            router_XH=draw(spec.num_experts, hidden),
            gate_up_E2FH=draw(shard.num_experts, 2 * size, hidden),
            down_EHF=draw(shard.num_experts, hidden, size),
        )

    embedding = draw(shard.vocab_rows, hidden)
    return ModelWeights(
        embedding_VH=embedding,
        layers=tuple(
            LayerWeights(
                attention_norm_H=ones,
                qkv_QH=draw(qkv_rows, hidden),
                out_HA=draw(hidden, q_rows),
                ffn_norm_H=ones,
                ffn=ffn(),
            )
            for _ in range(spec.num_layers)
        ),
        final_norm_H=ones,
        head_VH=embedding if spec.is_head_tied else draw(shard.vocab_rows, hidden),
    )
