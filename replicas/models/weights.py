"""One rank's weights: which slices of which tensors it reads, and how they lie in memory.

Query, key and value are one matrix, gate and up another: one product each. Tensor names end in shape
letters: H hidden, A query heads x head_dim, Q query+key+value rows, F hidden columns of the MLP or of an
expert, E local experts, X all experts, V local vocabulary rows. Built once per rank; read-only afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from replicas.errors import BadCheckpoint
from replicas.models.checkpoint import Checkpoint, Range
from replicas.models.spec import ModelSpec
from replicas.parallel.degrees import Shard

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total): bytes while loading."""

_EMBEDDING = "model.embed_tokens.weight"
_FINAL_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """A dense gated MLP: rows 0..F-1 of `gate_up` are the gate, the others up."""

    gate_up_2FH: torch.Tensor
    down_HF: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The local experts, then room for copies of others, and the router over all experts."""

    router_XH: torch.Tensor
    gate_up_E2FH: torch.Tensor
    down_EHF: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    attention_norm_H: torch.Tensor
    qkv_QH: torch.Tensor
    out_HA: torch.Tensor
    ffn_norm_H: torch.Tensor
    ffn: MlpWeights | ExpertWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """`head_VH` is `embedding_VH` itself where they are tied. Rows beyond the vocabulary are zero."""

    embedding_VH: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_H: torch.Tensor
    head_VH: torch.Tensor


def load_weights(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    shard: Shard,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> ModelWeights:
    """Read the slices of `shard`; BadCheckpoint names the file and the tensor that does not fit."""
    return _Loader(checkpoint, spec, shard, device, dtype, progress).load()


class _Loader:
    """Reads one rank's slices; counts the bytes and the names it used."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        shard: Shard,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._shard = shard
        self._device = device
        self._dtype = dtype
        self._progress = progress
        self._used: set[str] = set()
        self._done_bytes = 0
        self._total_bytes = sum(tensor.size_bytes for tensor in checkpoint.tensors.values())

    def load(self) -> ModelWeights:
        embedding_VH = self._vocab_rows(_EMBEDDING)
        layers = tuple(self._layer(index) for index in range(self._spec.num_layers))
        final_norm_H = self._whole(_FINAL_NORM, (self._spec.hidden_size,))
        head_VH = self._head(embedding_VH)
        # Older Llama checkpoints carry this constant, which is computed from the config instead.
        constants = {name for name in self._checkpoint.tensors if name.endswith(".rotary_emb.inv_freq")}
        self._checkpoint.refuse_others(self._used | constants)
        self._progress("weights", self._total_bytes, self._total_bytes)
        return ModelWeights(
            embedding_VH=embedding_VH, layers=layers, final_norm_H=final_norm_H, head_VH=head_VH
        )

    def _layer(self, index: int) -> LayerWeights:
        spec, shard, prefix = self._spec, self._shard, f"model.layers.{index}"
        heads = _span(shard.head_start, shard.num_heads, spec.head_dim)
        kv_heads = _span(shard.kv_head_start, shard.num_kv_heads, spec.head_dim)
        q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        hidden = (0, spec.hidden_size)
        attention = f"{prefix}.self_attn"
        return LayerWeights(
            attention_norm_H=self._whole(f"{prefix}.input_layernorm.weight", (spec.hidden_size,)),
            qkv_QH=torch.cat(
                [
                    self._read(f"{attention}.q_proj.weight", (q_rows, spec.hidden_size), (heads, hidden)),
                    self._read(f"{attention}.k_proj.weight", (kv_rows, spec.hidden_size), (kv_heads, hidden)),
                    self._read(f"{attention}.v_proj.weight", (kv_rows, spec.hidden_size), (kv_heads, hidden)),
                ]
            ),
            out_HA=self._read(f"{attention}.o_proj.weight", (spec.hidden_size, q_rows), (hidden, heads)),
            ffn_norm_H=self._whole(f"{prefix}.post_attention_layernorm.weight", (spec.hidden_size,)),
            ffn=self._experts(prefix) if spec.num_experts else self._mlp(prefix),
        )

    def _mlp(self, prefix: str) -> MlpWeights:
        size, hidden_size = self._spec.ffn_size, self._spec.hidden_size
        columns, hidden = _span(self._shard.ffn_start, self._shard.ffn_size), (0, hidden_size)
        return MlpWeights(
            gate_up_2FH=torch.cat(
                [
                    self._read(f"{prefix}.mlp.gate_proj.weight", (size, hidden_size), (columns, hidden)),
                    self._read(f"{prefix}.mlp.up_proj.weight", (size, hidden_size), (columns, hidden)),
                ]
            ),
            down_HF=self._read(f"{prefix}.mlp.down_proj.weight", (hidden_size, size), (hidden, columns)),
        )

    def _experts(self, prefix: str) -> ExpertWeights:
        """On disk gate and up are one matrix per expert; a slice of columns takes part of both halves."""
        spec, shard, prefix = self._spec, self._shard, f"{prefix}.block_sparse_moe"
        experts, hidden = _span(shard.expert_start, shard.num_experts), (0, spec.hidden_size)
        gate = _span(shard.ffn_start, shard.ffn_size)
        up = (gate[0] + spec.ffn_size, gate[1] + spec.ffn_size)
        name, shape = f"{prefix}.input_linear.weight", (spec.num_experts, 2 * spec.ffn_size, spec.hidden_size)
        is_split = shard.ffn_size < spec.ffn_size
        halves = (gate, up) if is_split else ((gate[0], up[1]),)
        gate_up = [self._read(name, shape, (experts, half, hidden)) for half in halves]
        return ExpertWeights(
            router_XH=self._whole(f"{prefix}.router.layer.weight", (spec.num_experts, spec.hidden_size)),
            gate_up_E2FH=self._with_spares(torch.cat(gate_up, dim=1) if is_split else gate_up[0]),
            down_EHF=self._with_spares(
                self._read(
                    f"{prefix}.output_linear.weight",
                    (spec.num_experts, spec.hidden_size, spec.ffn_size),
                    (experts, hidden, gate),
                )
            ),
        )

    def _with_spares(self, stacked: torch.Tensor) -> torch.Tensor:
        num_spare = self._shard.num_spare_experts
        return (
            torch.cat((stacked, stacked.new_zeros(num_spare, *stacked.shape[1:]))) if num_spare else stacked
        )

    def _head(self, embedding_VH: torch.Tensor) -> torch.Tensor:
        """A tied model may still store a head; if it differs it is the head, as transformers has it."""
        if not self._spec.is_head_tied:
            return self._vocab_rows(_HEAD)
        if _HEAD not in self._checkpoint.tensors:
            return embedding_VH
        head_VH = self._vocab_rows(_HEAD)
        return embedding_VH if torch.equal(head_VH, embedding_VH) else head_VH

    def _vocab_rows(self, name: str) -> torch.Tensor:
        spec, shard = self._spec, self._shard
        rows_VH = torch.zeros(shard.vocab_rows, spec.hidden_size, dtype=self._dtype, device=self._device)
        start = min(shard.vocab_start, spec.vocab_size)
        part = ((start, start + shard.vocab_valid), (0, spec.hidden_size))
        rows_VH[: shard.vocab_valid] = self._read(name, (spec.vocab_size, spec.hidden_size), part)
        return rows_VH

    def _whole(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._read(name, shape, tuple((0, size) for size in shape))

    def _read(self, name: str, shape: tuple[int, ...], part: tuple[Range, ...]) -> torch.Tensor:
        read = self._checkpoint.read(name, shape, part)
        tensor = read.to(device=self._device, dtype=self._dtype).contiguous()
        if not torch.isfinite(tensor).all():
            file = self._checkpoint.tensors[name].file
            raise BadCheckpoint(f"{file}: tensor {name} has values that are not finite in {self._dtype}")
        if name not in self._used:
            self._used.add(name)
            self._done_bytes += self._checkpoint.tensors[name].size_bytes
            self._progress("weights", self._done_bytes, self._total_bytes)
        return tensor


def _span(start: int, count: int, width: int = 1) -> Range:
    return start * width, (start + count) * width
