"""A decoder with its cache and nothing else: no scheduler, no sampler, no ranks. What the check times.

`DecodeLoop` is a decode step that feeds itself on the device, so that a graph of it needs no host between
steps: greedy tokens, positions, lengths and slots all advance there. Shape letters: B sequences, P pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench.gpu_check.setting import capture
from replicas.layers.attention import PagedKV, PagedSequences
from replicas.layers.triton.layers import DeviceLayers
from replicas.layers.triton.sample import best_tokens
from replicas.layers.triton.sequences import DeviceSequences
from replicas.models.decoder import Decoder
from replicas.models.spec import ModelSpec
from replicas.models.weights import ModelWeights
from replicas.parallel.collectives import SoloCollectives
from replicas.parallel.degrees import Shard
from replicas.rank.batch import Batch

_NO_SEQUENCES = PagedSequences(rows_B4=np.zeros((0, 4), np.int64), tables=np.zeros((0, 1), np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class BareModel:
    """One rank's decoder on device kernels, and the pages it reads."""

    spec: ModelSpec
    shard: Shard
    decoder: Decoder
    kv: PagedKV
    layers: DeviceLayers

    @property
    def block_tokens(self) -> int:
        return self.kv.keys[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.kv.keys[0].device

    def without_fusion(self, weights: ModelWeights) -> BareModel:
        """The same weights and cache, where one token takes the way of many."""
        layers = DeviceLayers(self.spec, self.shard, weights, self.kv, fuses_one_token=False)
        return replace(self, decoder=_decoder(self.spec, self.shard, weights, self.kv, layers), layers=layers)


def make_bare_model(
    spec: ModelSpec, shard: Shard, weights: ModelWeights, *, num_blocks: int, block_tokens: int
) -> BareModel:
    """`num_blocks` counts block 0, which is scratch."""
    embedding = weights.embedding_VH
    kv = PagedKV(
        num_layers=spec.num_layers,
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        num_kv_heads=shard.num_kv_heads,
        head_dim=spec.head_dim,
        device=embedding.device,
        dtype=embedding.dtype,
    )
    layers = DeviceLayers(spec, shard, weights, kv)
    return BareModel(
        spec=spec, shard=shard, decoder=_decoder(spec, shard, weights, kv, layers), kv=kv, layers=layers
    )


def _decoder(
    spec: ModelSpec, shard: Shard, weights: ModelWeights, kv: PagedKV, layers: DeviceLayers
) -> Decoder:
    return Decoder(spec, shard, weights, kv, SoloCollectives(), device_layers=layers)


def chunk_batch(model: BareModel, token_ids: torch.Tensor, *, first_block: int, start_pos: int = 0) -> Batch:
    """Tokens [T] of one sequence, its blocks in a row from `first_block` on; one token is a decode row."""
    num_tokens, page = len(token_ids), model.block_tokens
    positions = torch.arange(start_pos, start_pos + num_tokens, device=model.device)
    length = start_pos + num_tokens
    table = torch.arange(first_block, first_block - (-length // page), device=model.device, dtype=torch.int32)
    return Batch(
        token_ids_T=token_ids,
        positions_T=positions,
        slots_T=table[positions // page].long() * page + positions % page,
        spans=(),
        sequences=_NO_SEQUENCES,
        sampled_S=torch.tensor([num_tokens - 1], device=model.device),
        draws=(),
        device_sequences=DeviceSequences(
            tables_BP=table[None],
            lengths_B=torch.tensor([length], dtype=torch.int32, device=model.device),
            starts_C1=torch.tensor([0, num_tokens], dtype=torch.int32, device=model.device),
            num_decodes=int(num_tokens == 1),
            max_chunk_tokens=num_tokens,
            max_context_tokens=length,
        ),
    )


class DecodeLoop:
    """Greedy decode of B sequences that begin `start_pos` tokens long, each in blocks of its own.

    What lies in the cache before `start_pos` is whatever was there: time and energy do not depend on it.
    """

    def __init__(
        self, model: BareModel, token_ids_B: torch.Tensor, *, start_pos: int, max_tokens: int
    ) -> None:
        batch, page, device = len(token_ids_B), model.block_tokens, model.device
        pages = -(-(start_pos + max_tokens) // page)
        assert 1 + batch * pages <= model.kv.keys[0].shape[0], "the cache holds all sequences"
        self.max_tokens = max_tokens
        self._model = model
        self._start_pos = start_pos
        self._first_ids = token_ids_B.clone()
        self._ids = token_ids_B.clone()
        self._positions = torch.full((batch,), start_pos, dtype=torch.int64, device=device)
        self._tables = torch.arange(1, 1 + batch * pages, dtype=torch.int32, device=device).view(batch, pages)
        self._lengths = torch.full((batch,), start_pos + 1, dtype=torch.int32, device=device)
        self._keys = torch.zeros((batch, 2), dtype=torch.int32, device=device)
        self._cold = torch.zeros(batch, device=device)
        self._all_rows = torch.arange(batch, device=device)
        self._starts = torch.full((1,), batch, dtype=torch.int32, device=device)

    @property
    def token_ids(self) -> torch.Tensor:
        """The tokens of the last step; overwritten by the next."""
        return self._ids

    def experts_hit(self) -> int:
        """Experts that the last step ran, summed over the layers."""
        return int((self._model.layers.expert_counts_LX > 0).sum())

    def reset(self) -> None:
        """Back to the first token."""
        self._ids.copy_(self._first_ids)
        self._positions.fill_(self._start_pos)
        self._lengths.fill_(self._start_pos + 1)

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        """Of the next token of every sequence [B, V]; nothing advances."""
        return self._model.decoder.logits(self._batch())[0]

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every sequence, all on the device."""
        logits_BV = self.logits()
        _, index_B = best_tokens(
            logits_BV,
            num_valid=self._model.shard.vocab_valid,
            first_id=0,
            keys_S2=self._keys,
            temperatures_S=self._cold,
        )
        self._ids.copy_(index_B)
        self._positions.add_(1)
        self._lengths.add_(1)

    def captured(self) -> Callable[[], None]:
        """The step as a graph; the loop is back at its start."""
        with torch.inference_mode():
            self.step()
            replay = capture(self.step)
        self.reset()
        return replay

    def _batch(self) -> Batch:
        page = self._model.block_tokens
        block_B = self._tables.gather(1, (self._positions // page).unsqueeze(1)).squeeze(1)
        return Batch(
            token_ids_T=self._ids,
            positions_T=self._positions,
            slots_T=block_B.long() * page + self._positions % page,
            spans=(),
            sequences=_NO_SEQUENCES,
            sampled_S=self._all_rows,
            draws=(),
            device_sequences=DeviceSequences(
                tables_BP=self._tables,
                lengths_B=self._lengths,
                starts_C1=self._starts,
                num_decodes=len(self._ids),
                max_chunk_tokens=0,
                max_context_tokens=self._start_pos + self.max_tokens,
            ),
        )
