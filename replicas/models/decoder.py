"""The decoder: one skeleton for Llama, Granite and Granite MoE, on flat tokens.

Plain tensors and functions; what differs between the architectures is numbers of the spec and the kind of
MLP. Every rank runs it with its own shard, on the same batch or, in the `dispatch` layout, on a batch of its
own, of which only the experts see all ranks' tokens (U of them). Compiled kernels of a CPU, or those of a
CUDA device, take the place of the torch leaves of a half layer. Shape letters: T tokens of the step,
H hidden, S tokens whose logits are asked for, V local vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from replicas.layers.attention import PagedKV, attend
from replicas.layers.expert_routes import ExpertRoutes
from replicas.layers.experts import mix_experts
from replicas.layers.kernels.layers import CpuLayers
from replicas.layers.linear import embed, finish_logits, gate, linear
from replicas.layers.norm import rms_norm
from replicas.layers.rope import Rotation, inverse_frequencies, rotate, rotation_at
from replicas.models.spec import ModelSpec
from replicas.models.weights import LayerWeights, MlpWeights, ModelWeights
from replicas.parallel.collectives import Collectives, SoloCollectives
from replicas.parallel.degrees import Shard
from replicas.rank.batch import Batch

if TYPE_CHECKING:  # Needs Triton, which only machines with a GPU have.
    from replicas.layers.triton.layers import DeviceLayers


class Decoder:
    """One rank's shard of a model, with its KV cache. Owns neither rows nor sampling.

    `tally_LX` counts the tokens that each expert X of each layer L gets; None: nobody wants to know.
    `routes`, one per layer, are there where hot experts may have copies.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        weights: ModelWeights,
        kv: PagedKV,
        collectives: Collectives,
        kernels: CpuLayers | None = None,
        tally_LX: torch.Tensor | None = None,
        routes: Sequence[ExpertRoutes] = (),
        *,
        device_layers: DeviceLayers | None = None,
    ) -> None:
        self._spec = spec
        self._shard = shard
        self._embedding_VH = weights.embedding_VH
        self._final_norm_H = weights.final_norm_H
        # The kernels hold their own copy of the matrices: these need not stay in memory beside it.
        self._layers = weights.layers if kernels is None else ()
        self._head_VH = weights.head_VH if kernels is None else None
        self._kernels = kernels
        self._device_layers = device_layers
        self._kv = kv
        if tally_LX is None:
            shape = (spec.num_layers, spec.num_experts)
            tally_LX = torch.zeros(shape, dtype=torch.int64, device=weights.embedding_VH.device)
        self._tally_LX = tally_LX
        self._routes = routes
        self._collectives = collectives
        self._vocab_ranks = SoloCollectives() if shard.is_dispatched else collectives
        device = weights.embedding_VH.device
        self._frequencies_R = inverse_frequencies(spec.rope, spec.head_dim).to(device)

    def logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Run a step: float32 logits [S, V] of this rank's vocabulary rows, and the experts hit."""
        spec = self._spec
        x_TH = embed(batch.token_ids_T, self._embedding_VH, self._shard.vocab_start, self._vocab_ranks)
        if spec.embedding_multiplier != 1.0:
            x_TH *= spec.embedding_multiplier
        rotation = rotation_at(batch.positions_T, self._frequencies_R, x_TH.dtype)
        has_tokens = len(x_TH) > 0
        if self._kernels is not None and has_tokens:
            self._kernels.begin(rotation, batch.slots_T, batch.sequences)
        if self._device_layers is not None and has_tokens:
            assert batch.device_sequences is not None, "device layers read device sequences"
            self._device_layers.begin(rotation, batch.slots_T, batch.device_sequences)
        if self._kernels is not None and self._shard.is_whole:
            experts_hit: torch.Tensor | int = self._kernels.run(x_TH)
        else:
            experts_hit = self._run_layers(x_TH, rotation, batch)
        if self._device_layers is not None and not self._routes:
            self._tally_LX += self._device_layers.expert_counts_LX
        logits_SV = self._head(x_TH.index_select(0, batch.sampled_S))
        return finish_logits(logits_SV, self._shard.vocab_valid, spec.logits_divisor), experts_hit

    def _run_layers(self, x_TH: torch.Tensor, rotation: Rotation, batch: Batch) -> torch.Tensor | int:
        """All layers, in place; the experts hit."""
        experts_hit: torch.Tensor | int = 0
        # What a half layer gives is added by the next one, which on a device is part of its norm.
        delta_TH: torch.Tensor | None = None
        for index in range(self._spec.num_layers):
            delta_TH = self._attention(index, x_TH, delta_TH, rotation, batch)
            delta_TH, layer_hit = self._ffn(index, x_TH, delta_TH, batch.lane_tokens)
            experts_hit = experts_hit + layer_hit
        self._add(x_TH, delta_TH)
        return experts_hit

    def _add(self, x_TH: torch.Tensor, delta_TH: torch.Tensor | None) -> None:
        if delta_TH is not None:
            x_TH.add_(delta_TH, alpha=self._spec.residual_multiplier)

    def _attention(
        self,
        index: int,
        x_TH: torch.Tensor,
        delta_TH: torch.Tensor | None,
        rotation: Rotation,
        batch: Batch,
    ) -> torch.Tensor:
        if not len(x_TH):
            return x_TH
        if self._device_layers is not None:
            out_TH = self._device_layers.attention(index, x_TH, delta_TH)
        elif self._kernels is not None:
            self._add(x_TH, delta_TH)
            out_TH = self._kernels.attention(index, x_TH)
        else:
            self._add(x_TH, delta_TH)
            out_TH = self._torch_attention(index, self._layers[index], x_TH, rotation, batch)
        return self._collectives.all_reduce(out_TH) if self._shard.is_attention_split else out_TH

    def _ffn(
        self, index: int, x_TH: torch.Tensor, delta_TH: torch.Tensor | None, lane_tokens: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        if not self._shard.is_dispatched:
            out_TH, experts_hit = self._ffn_part(index, x_TH, delta_TH)
            return self._collectives.all_reduce(out_TH) if self._shard.is_ffn_split else out_TH, experts_hit
        self._add(x_TH, delta_TH)
        x_UH = self._collectives.all_gather_rows(x_TH, lane_tokens)
        out_UH, experts_hit = self._ffn_part(index, x_UH, None)
        return self._collectives.reduce_scatter_rows(out_UH, lane_tokens), experts_hit

    def _ffn_part(
        self, index: int, x_TH: torch.Tensor, delta_TH: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """What this rank's columns or experts make of the tokens, and how many experts were hit anywhere."""
        if self._device_layers is not None and not self._routes:
            return self._device_layers.ffn(index, x_TH, delta_TH)
        self._add(x_TH, delta_TH)
        if self._kernels is not None:
            return self._kernels.ffn(index, x_TH)
        return self._torch_ffn(index, self._layers[index], x_TH)

    def _head(self, x_SH: torch.Tensor) -> torch.Tensor:
        if self._device_layers is not None:
            return self._device_layers.head(x_SH)
        if self._kernels is not None:
            return self._kernels.head(x_SH)
        assert self._head_VH is not None
        return linear(rms_norm(x_SH, self._final_norm_H, self._spec.norm_eps), self._head_VH)

    def _torch_attention(
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
        return linear(mixed, layer.out_HA)

    def _torch_ffn(
        self, index: int, layer: LayerWeights, x_TH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        normed_TH = rms_norm(x_TH, layer.ffn_norm_H, self._spec.norm_eps)
        if isinstance(layer.ffn, MlpWeights):
            return linear(gate(linear(normed_TH, layer.ffn.gate_up_2FH)), layer.ffn.down_HF), 0
        return mix_experts(
            normed_TH,
            layer.ffn,
            self._tally_LX[index],
            num_choices=self._spec.experts_per_token,
            first_expert=self._shard.expert_start,
            routes=self._routes[index] if self._routes else None,
        )
