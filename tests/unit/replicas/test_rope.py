"""Rotary angles are those of transformers, and depend on distances alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from replicas.layers.rope import inverse_frequencies, rotate, rotation_at
from replicas.models.spec import RopeSpec

LLAMA3 = RopeSpec(
    theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_tokens=64
)


def reference(rope: RopeSpec, head_dim: int) -> LlamaRotaryEmbedding:
    parameters: dict[str, object] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.factor != 1.0:
        parameters |= {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_context_tokens,
        }
    return LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=parameters)
    )


@pytest.mark.parametrize("rope", [RopeSpec(theta=10_000.0), LLAMA3])
def test_rotated_heads_are_those_of_transformers(rope: RopeSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TND = torch.randn(5, 3, 32, generator=generator)
    positions_T = torch.tensor([0, 1, 17, 63, 300])
    ours = rotate(x_TND, rotation_at(positions_T, inverse_frequencies(rope, 32), torch.float32))
    cos, sin = reference(rope, 32)(x_TND, positions_T.unsqueeze(0))
    theirs, _ = apply_rotary_pos_emb(
        x_TND.transpose(0, 1).unsqueeze(0), x_TND.transpose(0, 1).unsqueeze(0), cos, sin
    )
    torch.testing.assert_close(ours, theirs.squeeze(0).transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 16, generator=generator), torch.randn(1, 1, 16, generator=generator)
    frequencies_R = inverse_frequencies(RopeSpec(theta=10_000.0), 16)

    def score(q_pos: int, k_pos: int) -> float:
        rotated = [
            rotate(x, rotation_at(torch.tensor([pos]), frequencies_R, torch.float32))
            for x, pos in ((q, q_pos), (k, k_pos))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
