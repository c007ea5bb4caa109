"""A rank's decoder layers on a CUDA device: Triton kernels between the matrix products of torch.

Per half layer: residual sum and norm in one kernel; the fused product; rotation and cache write in one;
attention over pages (`page_attention.py`); the output product. A step with one token on one rank goes through
the shorter chain of `one_token.py`. Nothing here waits for the device or looks at a value on it, so that a
decode step can be captured in a CUDA graph; kernels are chosen by host integers alone. Partial sums come
back as the torch path gives them: the decoder adds up ranks. The weights are the rank's own, not copied.
Shape letters: T tokens, H hidden, S sampled tokens, V local vocabulary rows, X all experts.
"""

from __future__ import annotations

import torch

from replicas.layers.attention import PagedKV
from replicas.layers.linear import linear
from replicas.layers.rope import Rotation
from replicas.layers.triton.add_norm import add_norm
from replicas.layers.triton.combine import combine_experts
from replicas.layers.triton.expert_lists import list_pairs
from replicas.layers.triton.grouped_linear import PairLists, down_experts, gated_experts
from replicas.layers.triton.one_token import OneToken
from replicas.layers.triton.page_attention import PageAttention
from replicas.layers.triton.rope_cache import rope_to_cache
from replicas.layers.triton.router import choose_experts
from replicas.layers.triton.sequences import DeviceSequences
from replicas.layers.triton.swiglu import swiglu
from replicas.layers.triton.varlen import find_varlen
from replicas.models.spec import ModelSpec
from replicas.models.weights import ExpertWeights, MlpWeights, ModelWeights
from replicas.parallel.degrees import Shard


class DeviceLayers:
    """Runs the layers of one rank. Not reentrant: one step at a time, between `begin` calls.

    `attention` and `ffn` first add what the half layer before gave, `delta_TH`, to `x_TH` in place (times the
    residual multiplier); None: there was none. `fuses_one_token` False: one token takes the way of many.
    `pages` attends; its choice is the owner's to set.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        weights: ModelWeights,
        kv: PagedKV,
        *,
        fuses_one_token: bool = True,
    ) -> None:
        self._spec = spec
        self._shard = shard
        self._weights = weights
        self._kv = kv
        self.pages = PageAttention(scale=spec.attention_scale, find=find_varlen)
        self._step: tuple[Rotation, torch.Tensor] | None = None
        self.expert_counts_LX = torch.zeros(
            (spec.num_layers, spec.num_experts), device=weights.embedding_VH.device, dtype=torch.int32
        )
        """Pairs of every expert in the last step, per layer; padding is of none."""
        self._one_token = OneToken(spec, weights) if fuses_one_token and shard.is_whole else None

    def begin(self, rotation: Rotation, slots_T: torch.Tensor, sequences: DeviceSequences) -> None:
        """Where the tokens of the next calls are: angles, slots to write, pages to read."""
        self._step = (rotation, slots_T)
        self.pages.begin(sequences)

    def attention(self, index: int, x_TH: torch.Tensor, delta_TH: torch.Tensor | None) -> torch.Tensor:
        """This rank's heads' part of attention [T, H]; writes the new tokens to the cache."""
        assert self._step is not None, "begin() comes before the layers"
        rotation, slots_T = self._step
        layer, keys, values = self._weights.layers[index], self._kv.keys[index], self._kv.values[index]
        one_token = self._one_token if len(x_TH) == 1 else None
        if one_token is not None:
            qkv_TC = one_token.project(x_TH, delta_TH, layer)
        else:
            qkv_TC = linear(self._add_norm(x_TH, delta_TH, layer.attention_norm_H), layer.qkv_QH)
        q_TND = rope_to_cache(qkv_TC, rotation, slots_T, keys, values, num_heads=self._shard.num_heads)
        mixed_TND = self.pages.attend(q_TND, keys, values)
        if one_token is not None:
            return one_token.add_mixed(x_TH, mixed_TND, layer)
        return linear(mixed_TND.flatten(1), layer.out_HA)

    def ffn(
        self, index: int, x_TH: torch.Tensor, delta_TH: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """This rank's part of the MLP or the experts [T, H]; with the last layer the experts hit in all."""
        layer, counts_X = self._weights.layers[index], self.expert_counts_LX[index]
        if self._one_token is not None and len(x_TH) == 1:
            out_TH = self._one_token.add_ffn(x_TH, delta_TH, layer, counts_X)
        else:
            normed_TH = self._add_norm(x_TH, delta_TH, layer.ffn_norm_H)
            if isinstance(layer.ffn, MlpWeights):
                out_TH = linear(swiglu(linear(normed_TH, layer.ffn.gate_up_2FH)), layer.ffn.down_HF)
            else:
                out_TH = self._mix_experts(normed_TH, layer.ffn, counts_X)
        has_counts = self._spec.num_experts > 0 and index == self._spec.num_layers - 1
        return out_TH, (self.expert_counts_LX > 0).sum() if has_counts else 0

    def head(self, x_SH: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of this rank's vocabulary rows over normed `x_SH`, neither divided nor masked."""
        if self._one_token is not None and len(x_SH) == 1:
            return self._one_token.head(x_SH)
        return linear(self._add_norm(x_SH, None, self._weights.final_norm_H), self._weights.head_VH)

    def close(self) -> None:
        """Let go of the last step's tensors."""
        self._step = None
        self.pages.close()

    def _add_norm(
        self, x_TH: torch.Tensor, delta_TH: torch.Tensor | None, weight_H: torch.Tensor
    ) -> torch.Tensor:
        multiplier = self._spec.residual_multiplier
        return add_norm(x_TH, delta_TH, weight_H, multiplier=multiplier, eps=self._spec.norm_eps)

    def _mix_experts(
        self, x_TH: torch.Tensor, weights: ExpertWeights, counts_X: torch.Tensor
    ) -> torch.Tensor:
        assert self._step is not None, "begin() comes before the layers"
        _, slots_T = self._step
        num_choices, first_expert = self._spec.experts_per_token, self._shard.expert_start
        num_local = weights.gate_up_E2FH.shape[0]
        choices_TC, shares_TC = choose_experts(linear(x_TH, weights.router_XH), slots_T, num_choices)
        pairs_ET = list_pairs(choices_TC, counts_X, first_expert=first_expert, num_local=num_local)
        lists = PairLists(
            pairs_ET=pairs_ET, counts_X=counts_X, first_expert=first_expert, num_choices=num_choices
        )
        y_MH = down_experts(gated_experts(x_TH, weights.gate_up_E2FH, lists), weights.down_EHF, lists)
        return combine_experts(y_MH, choices_TC, shares_TC, first_expert=first_expert, num_local=num_local)
