"""The decoder: one skeleton for Llama, Granite and Granite MoE, on flat tokens.

Plain tensors and functions; what differs between the architectures is numbers of the spec and the kind of
MLP. Every rank runs it on the same batch with its own shard. Shape letters: T tokens of the step, H hidden,
S tokens whose logits are asked for, V local vocabulary rows.
"""

from __future__ import annotations

import torch

from replicas.layers.attention import PagedKV, attend
from replicas.layers.experts import mix_experts
from replicas.layers.linear import embed, gate, head_logits, linear
from replicas.layers.norm import rms_norm
from replicas.layers.rope import Rotation, inverse_frequencies, rotate, rotation_at
from replicas.models.spec import ModelSpec
from replicas.models.weights import LayerWeights, MlpWeights, ModelWeights
from replicas.parallel.collectives import Collectives
from replicas.parallel.degrees import Shard
from replicas.rank.batch import Batch


class Decoder:
    """One rank's shard of a model, with its KV cache. Owns neither rows nor sampling."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: ModelWeights, kv: PagedKV, collectives: Collectives
    ) -> None:
        self._spec = spec
        self._shard = shard
        self._weights = weights
        self._kv = kv
        self._collectives = collectives
        device = weights.embedding_VH.device
        self._frequencies_R = inverse_frequencies(spec.rope, spec.head_dim).to(device)

    def logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Run a step: float32 logits [S, V] of this rank's vocabulary rows, and the experts hit."""
        spec, weights = self._spec, self._weights
        x_TH = embed(batch.token_ids_T, weights.embedding_VH, self._shard.vocab_start, self._collectives)
        if spec.embedding_multiplier != 1.0:
            x_TH *= spec.embedding_multiplier
        rotation = rotation_at(batch.positions_T, self._frequencies_R, x_TH.dtype)
        experts_hit: torch.Tensor | int = 0
        for index, layer in enumerate(weights.layers):
            x_TH.add_(self._attention(index, layer, x_TH, rotation, batch), alpha=spec.residual_multiplier)
            ffn_TH, layer_hit = self._ffn(layer, x_TH)
            x_TH.add_(ffn_TH, alpha=spec.residual_multiplier)
            experts_hit = experts_hit + layer_hit
        x_SH = rms_norm(x_TH.index_select(0, batch.sampled_S), weights.final_norm_H, spec.norm_eps)
        return head_logits(x_SH, weights.head_VH, self._shard.vocab_valid, spec.logits_divisor), experts_hit

    def _attention(
        self, index: int, layer: LayerWeights, x_TH: torch.Tensor, rotation: Rotation, batch: Batch
    ) -> torch.Tensor:
        shard, spec = self._shard, self._spec
        qkv = linear(rms_norm(x_TH, layer.attention_norm_H, spec.norm_eps), layer.qkv_QH)
        heads = qkv.view(len(qkv), shard.num_heads + 2 * shard.num_kv_heads, spec.head_dim)
        num_rotated = shard.num_heads + shard.num_kv_heads
        rotated = rotate(heads[:, :num_rotated], rotation)
        mixed = attend(
            self._kv,
            index,
            rotated[:, : shard.num_heads],
            rotated[:, shard.num_heads :],
            heads[:, num_rotated:],
            slots_T=batch.slots_T,
            spans=batch.spans,
            scale=spec.attention_scale,
        )
        out_TH = linear(mixed, layer.out_HA)
        return self._collectives.all_reduce(out_TH) if shard.is_attention_split else out_TH

    def _ffn(self, layer: LayerWeights, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | int]:
        normed_TH = rms_norm(x_TH, layer.ffn_norm_H, self._spec.norm_eps)
        experts_hit: torch.Tensor | int = 0
        if isinstance(layer.ffn, MlpWeights):
            out_TH = linear(gate(linear(normed_TH, layer.ffn.gate_up_2FH)), layer.ffn.down_HF)
        else:
            out_TH, experts_hit = mix_experts(
                normed_TH,
                layer.ffn,
                num_choices=self._spec.experts_per_token,
                first_expert=self._shard.expert_start,
            )
        if self._shard.is_ffn_split:
            out_TH = self._collectives.all_reduce(out_TH)
        return out_TH, experts_hit
