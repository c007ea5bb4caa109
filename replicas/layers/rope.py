"""Rotary position embedding: which frequencies, and how heads are rotated.

Shape letters: T tokens, N heads, D head_dim, R = D/2 rotated pairs. Element i pairs with i + R, as in the
checkpoints. Angles are computed per step, not tabled: a table for a long context is larger than the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from replicas.models.spec import RopeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Cosine, and sine with the sign of its half, of every token; broadcast over heads."""

    cos_T1D: torch.Tensor
    signed_sin_T1D: torch.Tensor


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """[R] float32. Llama 3 stretches wavelengths beyond the trained context by `factor`, blending between."""
    exponents_R = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies_R = 1.0 / (rope.theta**exponents_R)
    if rope.factor == 1.0:
        return frequencies_R
    turns_R = rope.original_context_tokens * frequencies_R / (2 * math.pi)
    kept_R = (turns_R - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept_R = kept_R.clamp(0.0, 1.0)
    return kept_R * frequencies_R + (1.0 - kept_R) * frequencies_R / rope.factor


def rotation_at(positions_T: torch.Tensor, frequencies_R: torch.Tensor, dtype: torch.dtype) -> Rotation:
    """Angles of the tokens at `positions_T`, computed in float32, kept in the model's dtype."""
    angles_TR = positions_T.to(torch.float32).unsqueeze(1) * frequencies_R
    cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
    return Rotation(
        cos_T1D=torch.cat((cos_TR, cos_TR), dim=1).unsqueeze(1).to(dtype),
        signed_sin_T1D=torch.cat((-sin_TR, sin_TR), dim=1).unsqueeze(1).to(dtype),
    )


def rotate(x_TND: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """(a, b) becomes (a cos - b sin, b cos + a sin) for every pair; a new contiguous tensor."""
    a_TNR, b_TNR = x_TND.chunk(2, dim=-1)
    swapped_TND = torch.cat((b_TNR, a_TNR), dim=-1)
    return torch.addcmul(x_TND * rotation.cos_T1D, swapped_TND, rotation.signed_sin_T1D)
