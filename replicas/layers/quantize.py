"""Weights in eight bits: symmetric, one factor per output row. Activations stay what they are.

    row = [0.5, -1.27, 0.004]  ->  scale 0.01, values [50, -127, 0]  ->  read as [0.5, -1.27, 0.0]

An entry is off by at most half its row's scale. The compiled kernels widen the bytes in registers; torch gets
the rounded weights in its own dtype, so both compute the same function. Embeddings, norms and routers keep
their bits. Shape letters: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from replicas.models.weights import ExpertWeights, LayerWeights, ModelWeights

MAX_BYTE = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteMatrix:
    """`values_OI` in -127..127; row o of the weight is scales_O[o] * values_OI[o].

    Stacks of matrices have more leading dims, in both.
    """

    values_OI: torch.Tensor
    scales_O: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        return self.values_OI.float() * self.scales_O.unsqueeze(-1)


def quantize(weight_OI: torch.Tensor) -> ByteMatrix:
    """The nearest bytes, in float32 arithmetic. A row of zeros has scale 1."""
    wide_OI = weight_OI.float()
    scales_O = wide_OI.abs().amax(dim=-1) / MAX_BYTE
    scales_O = torch.where(scales_O > 0, scales_O, 1.0)
    values_OI = (wide_OI / scales_O.unsqueeze(-1)).round_().clamp_(-MAX_BYTE, MAX_BYTE)
    return ByteMatrix(values_OI=values_OI.to(torch.int8), scales_O=scales_O)


def rounded(weight_OI: torch.Tensor) -> torch.Tensor:
    """What the quantised weight stands for, in the dtype of the given one."""
    return quantize(weight_OI).dequantized().to(weight_OI.dtype)


def round_weights(weights: ModelWeights) -> ModelWeights:
    """All that `CpuLayers` would keep in bytes, rounded, for torch. A tied head parts from its embedding."""
    return replace(
        weights,
        layers=tuple(_round_layer(layer) for layer in weights.layers),
        head_VH=rounded(weights.head_VH),
    )


def _round_layer(layer: LayerWeights) -> LayerWeights:
    ffn = layer.ffn
    ffn = (
        replace(ffn, gate_up_E2FH=rounded(ffn.gate_up_E2FH), down_EHF=rounded(ffn.down_EHF))
        if isinstance(ffn, ExpertWeights)
        else replace(ffn, gate_up_2FH=rounded(ffn.gate_up_2FH), down_HF=rounded(ffn.down_HF))
    )
    return replace(layer, qkv_QH=rounded(layer.qkv_QH), out_HA=rounded(layer.out_HA), ffn=ffn)
