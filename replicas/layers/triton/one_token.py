"""The half layers of a step with one token, all of it on one rank: fewer launches, each reading weights once.

A step of one short sequence is as many launches as kernels, at two microseconds and more each: here 7 of a
dense layer instead of 10, and 8 of a mixture of experts instead of 13. What a half layer gives is added to
the residual where it is computed, so what the decoder gets to add is zero. Shape letters: H hidden,
C outputs, N query heads, D head_dim, F hidden columns, V local vocabulary rows, X experts.
"""

from __future__ import annotations

import torch

from replicas.layers.triton.token_add import add_product
from replicas.layers.triton.token_gated import norm_gated
from replicas.layers.triton.token_linear import norm_linear
from replicas.layers.triton.token_router import norm_router
from replicas.models.spec import ModelSpec
from replicas.models.weights import LayerWeights, MlpWeights, ModelWeights


class OneToken:
    """Around the rotation and the attention, which are those of many tokens."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights) -> None:
        self._spec = spec
        self._weights = weights
        embedding = weights.embedding_VH
        self._nothing_1H = torch.zeros((1, spec.hidden_size), device=embedding.device, dtype=embedding.dtype)

    def project(self, x_1H: torch.Tensor, delta_1H: torch.Tensor | None, layer: LayerWeights) -> torch.Tensor:
        """Queries, keys and values [1, C], not rotated."""
        self._add(x_1H, delta_1H)
        return norm_linear(x_1H, layer.attention_norm_H, layer.qkv_QH, eps=self._spec.norm_eps)

    def add_mixed(self, x_1H: torch.Tensor, mixed_1ND: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        """Add the output product of the attention; zeros."""
        multiplier = self._spec.residual_multiplier
        add_product(x_1H, mixed_1ND.view(1, -1), layer.out_HA, multiplier=multiplier)
        return self._nothing_1H

    def add_ffn(
        self, x_1H: torch.Tensor, delta_1H: torch.Tensor | None, layer: LayerWeights, counts_X: torch.Tensor
    ) -> torch.Tensor:
        """Add the MLP or the experts, which are counted; zeros."""
        self._add(x_1H, delta_1H)
        ffn, norm_H, eps = layer.ffn, layer.ffn_norm_H, self._spec.norm_eps
        multiplier = self._spec.residual_multiplier
        if isinstance(ffn, MlpWeights):
            hidden_1F = norm_gated(x_1H, norm_H, ffn.gate_up_2FH, eps=eps)
            add_product(x_1H, hidden_1F, ffn.down_HF, multiplier=multiplier)
            return self._nothing_1H
        num_choices = self._spec.experts_per_token
        choices_1C, shares_1C = norm_router(
            x_1H, norm_H, ffn.router_XH, counts_X, num_choices=num_choices, eps=eps
        )
        hidden_CF = norm_gated(x_1H, norm_H, ffn.gate_up_E2FH, eps=eps, choices_1C=choices_1C)
        add_product(
            x_1H,
            hidden_CF,
            ffn.down_EHF,
            multiplier=multiplier,
            choices_1C=choices_1C,
            shares_1C=shares_1C,
        )
        return self._nothing_1H

    def head(self, x_1H: torch.Tensor) -> torch.Tensor:
        """Logits [1, V]."""
        weights = self._weights
        return norm_linear(x_1H, weights.final_norm_H, weights.head_VH, eps=self._spec.norm_eps)

    def _add(self, x_1H: torch.Tensor, delta_1H: torch.Tensor | None) -> None:
        """What a half layer that ran elsewhere gave."""
        if delta_1H is not None and delta_1H is not self._nothing_1H:
            x_1H.add_(delta_1H, alpha=self._spec.residual_multiplier)
