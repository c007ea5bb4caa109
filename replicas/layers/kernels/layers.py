"""A rank's decoder layers on the compiled kernels: packed weights, and one call for all layers of a step.

Where ranks add up what each gives, it is one call per half layer. Holds its own copy of the matrices; the KV
cache is the rank's, in the same layout as torch reads it. Partial sums come back as the torch path gives
them, so that the decoder adds up ranks either way. Shape letters: T tokens, H hidden, S sampled tokens, V
local vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, pointer
from dataclasses import dataclass

import torch

from replicas.layers.attention import PagedKV, PagedSequences
from replicas.layers.expert_routes import ExpertRoutes
from replicas.layers.kernels.library import (
    CAttentionLayer,
    CExpertLayer,
    CLayer,
    CMatrix,
    CMlpLayer,
    CStep,
    KernelPool,
    PackedMatrix,
    Storage,
)
from replicas.layers.rope import Rotation
from replicas.models.spec import ModelSpec
from replicas.models.weights import ExpertWeights, LayerWeights, MlpWeights, ModelWeights
from replicas.parallel.degrees import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class _KernelStep:
    """The C structure of a step, and the tensors it points into."""

    layout: CStep
    owners: tuple[object, ...]


class CpuLayers:
    """Runs the layers of one rank. Not reentrant: one step at a time, between `begin` calls."""

    def __init__(
        self,
        pool: KernelPool,
        spec: ModelSpec,
        shard: Shard,
        weights: ModelWeights,
        kv: PagedKV,
        tally_LX: torch.Tensor,
        routes: Sequence[ExpertRoutes] = (),
        *,
        storage: Storage,
    ) -> None:
        self._pool = pool
        self._spec = spec
        self._shard = shard
        self._kv = kv
        self._tally_LX = tally_LX
        self._routes = routes
        self._experts: dict[int, list[tuple[PackedMatrix, ...]]] = {}
        """Per layer and slot: gate, up and down."""
        self._storage = storage
        self._owned: list[torch.Tensor] = []
        self._matrices: list[PackedMatrix] = []
        self._attention = [self._pack_attention(index, layer) for index, layer in enumerate(weights.layers)]
        self._ffn = [
            self._pack_mlp(layer, layer.ffn)
            if isinstance(layer.ffn, MlpWeights)
            else self._pack_experts(index, layer, layer.ffn)
            for index, layer in enumerate(weights.layers)
        ]
        self._layers = (CLayer * spec.num_layers)(*map(_joined, self._attention, self._ffn))
        self._final_norm_H = weights.final_norm_H
        self._head = self._pack(weights.head_VH)
        self._step: _KernelStep | None = None

    @property
    def name(self) -> str:
        """Instruction set and what the matrices are kept in, such as `avx512-bfloat16`."""
        kinds = {str(matrix.panels.dtype).removeprefix("torch.") for matrix in self._matrices}
        return f"{self._pool.instruction_set}-{kinds.pop() if len(kinds) == 1 else 'mixed'}"

    @property
    def bytes_per_weight(self) -> float:
        """Mean over all matrices, their factors included."""
        num_weights = sum(matrix.layout.num_rows * matrix.layout.num_columns for matrix in self._matrices)
        return float(sum(matrix.num_bytes for matrix in self._matrices) / num_weights)

    def begin(self, rotation: Rotation, slots_T: torch.Tensor, sequences: PagedSequences) -> None:
        """Where the tokens of the next calls are: angles, slots to write, pages to read."""
        spec, shard = self._spec, self._shard
        cos_TD, sin_TD = rotation.cos_T1D.contiguous(), rotation.signed_sin_T1D.contiguous()
        layout = CStep(
            num_tokens=len(slots_T),
            num_sequences=len(sequences.rows_B4),
            num_heads=shard.num_heads,
            num_kv_heads=shard.num_kv_heads,
            head_dim=spec.head_dim,
            block_tokens=self._kv.keys[0].shape[1],
            table_stride=sequences.tables.shape[1],
            cosine=cos_TD.data_ptr(),
            signed_sine=sin_TD.data_ptr(),
            slots=slots_T.data_ptr(),
            sequences=sequences.rows_B4.ctypes.data,
            tables=sequences.tables.ctypes.data,
            eps=spec.norm_eps,
            scale=spec.attention_scale,
        )
        self._step = _KernelStep(layout=layout, owners=(cos_TD, sin_TD, slots_T, sequences))

    def run(self, x_TH: torch.Tensor) -> int:
        """All layers, in place, where no other rank has a part of them; how many experts were hit."""
        assert self._step is not None
        assert x_TH.is_contiguous()
        delta_TH = torch.empty_like(x_TH)
        num_hit: int = self._pool.library.wl_layers(
            self._pool.handle,
            self._layers,
            len(self._layers),
            byref(self._step.layout),
            x_TH.data_ptr(),
            delta_TH.data_ptr(),
            self._spec.residual_multiplier,
        )
        return num_hit

    def attention(self, index: int, x_TH: torch.Tensor) -> torch.Tensor:
        """This rank's heads' part of attention over normed `x_TH`; writes the new tokens to the cache."""
        assert self._step is not None
        assert x_TH.is_contiguous()
        out_TH = torch.empty_like(x_TH)
        self._pool.library.wl_attention(
            self._pool.handle,
            byref(self._attention[index]),
            byref(self._step.layout),
            x_TH.data_ptr(),
            out_TH.data_ptr(),
        )
        return out_TH

    def ffn(self, index: int, x_TH: torch.Tensor) -> tuple[torch.Tensor, int]:
        """This rank's part of the MLP or the experts over normed `x_TH`, and how many experts were hit."""
        out_TH = torch.empty_like(x_TH)
        layer, library = self._ffn[index], self._pool.library
        run = library.wl_mlp if isinstance(layer, CMlpLayer) else library.wl_experts
        hit = run(
            self._pool.handle,
            byref(layer),
            x_TH.data_ptr(),
            out_TH.data_ptr(),
            x_TH.shape[0],
            self._spec.norm_eps,
        )
        return out_TH, hit or 0

    def head(self, x_SH: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of this rank's vocabulary rows over normed `x_SH`, neither divided nor masked."""
        logits_SV = x_SH.new_empty((x_SH.shape[0], self._head.layout.num_rows))
        self._pool.library.wl_head(
            self._pool.handle,
            self._final_norm_H.data_ptr(),
            byref(self._head.layout),
            x_SH.data_ptr(),
            logits_SV.data_ptr(),
            x_SH.shape[0],
            self._spec.norm_eps,
        )
        return logits_SV

    def peaks(self, logits_SV: torch.Tensor, num_valid: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`replicas.rank.sampler.Peaks`."""
        return self._pool.peaks(logits_SV, num_valid)

    def expert_tensors(self, layer: int, slot: int) -> tuple[torch.Tensor, ...]:
        """What the matrices of one expert are packed in: gate, up, down."""
        return tuple(tensor for matrix in self._experts[layer][slot] for tensor in matrix.tensors)

    def put_expert(self, layer: int, slot: int, tensors: Sequence[torch.Tensor]) -> None:
        """Fill a spare slot with another rank's expert, as that rank packed it."""
        packed, own = self._experts[layer], self._experts[layer][0]
        per_matrix = len(tensors) // len(own)
        matrices = tuple(
            PackedMatrix.of(*tensors[kind * per_matrix : (kind + 1) * per_matrix], shape=matrix.shape)
            for kind, matrix in enumerate(own)
        )
        packed.extend([matrices] * (slot + 1 - len(packed)))
        packed[slot] = matrices
        c_layer = self._ffn[layer]
        assert isinstance(c_layer, CExpertLayer)
        for stacked, matrix in zip((c_layer.gate, c_layer.up, c_layer.down), matrices, strict=True):
            stacked[slot] = matrix.layout

    def close(self) -> None:
        """Join the threads; no call may follow."""
        self._pool.close()

    def _pack_attention(self, index: int, layer: LayerWeights) -> CAttentionLayer:
        return CAttentionLayer(
            norm_weight=self._keep(layer.attention_norm_H),
            qkv=self._pack(layer.qkv_QH).layout,
            out=self._pack(layer.out_HA).layout,
            keys=self._kv.keys[index].data_ptr(),
            values=self._kv.values[index].data_ptr(),
        )

    def _pack_mlp(self, layer: LayerWeights, mlp: MlpWeights) -> CMlpLayer:
        gate_FH, up_FH = mlp.gate_up_2FH.chunk(2)
        return CMlpLayer(
            norm_weight=self._keep(layer.ffn_norm_H),
            gate=self._pack(gate_FH).layout,
            up=self._pack(up_FH).layout,
            down=self._pack(mlp.down_HF).layout,
        )

    def _pack_experts(self, index: int, layer: LayerWeights, experts: ExpertWeights) -> CExpertLayer:
        count, num_home = experts.down_EHF.shape[0], self._shard.num_experts
        gate_EFH, up_EFH = experts.gate_up_E2FH[:num_home].chunk(2, dim=1)
        packed = [
            tuple(self._pack(stacked[slot]) for stacked in (gate_EFH, up_EFH, experts.down_EHF))
            for slot in range(num_home)
        ]
        self._experts[index] = packed
        gate, up, down = (
            (CMatrix * count)(*(matrices[kind].layout for matrices in packed)) for kind in range(3)
        )
        routes = self._routes[index] if self._routes else None
        return CExpertLayer(
            norm_weight=self._keep(layer.ffn_norm_H),
            router=self._pack_router(experts.router_XH).layout,
            gate=gate,
            up=up,
            down=down,
            num_choices=self._spec.experts_per_token,
            first_expert=self._shard.expert_start if routes is None else 0,
            num_local=count,
            tally=self._tally_LX[index].data_ptr(),
            copies=None if routes is None else routes.copies_X.data_ptr(),
            slots=None if routes is None else routes.slots_XR.data_ptr(),
            num_ranks=0 if routes is None else routes.slots_XR.shape[1],
        )

    def _pack(self, weight: torch.Tensor) -> PackedMatrix:
        packed = self._pool.pack(weight, self._storage)
        self._matrices.append(packed)
        return packed

    def _pack_router(self, weight: torch.Tensor) -> PackedMatrix:
        """Small, and it decides: never in bytes."""
        exact = Storage.SMALLEST if self._storage is Storage.INT8 else self._storage
        packed = self._pool.pack(weight, exact)
        self._keep(packed.panels)
        return packed

    def _keep(self, tensor: torch.Tensor) -> int:
        """The address of a tensor that C structures point into from now on."""
        self._owned.append(tensor)
        return tensor.data_ptr()


def _joined(attention: CAttentionLayer, ffn: CMlpLayer | CExpertLayer) -> CLayer:
    if isinstance(ffn, CMlpLayer):
        return CLayer(attention=pointer(attention), mlp=pointer(ffn))
    return CLayer(attention=pointer(attention), experts=pointer(ffn))
