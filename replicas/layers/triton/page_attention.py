"""Attention of a step over pages: decode rows and prompt chunks, each by whom the choice says.

Which of the two kinds computes is a question of host integers alone, so a captured graph holds one of them.
Shape letters: T tokens, N query heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from replicas.attention_choice import TRITON_ALONE, AttentionChoice
from replicas.layers.triton.decode_attention import decode_attention
from replicas.layers.triton.prefill_attention import prefill_attention
from replicas.layers.triton.sequences import DeviceSequences
from replicas.layers.triton.varlen import (
    VarlenAttention,
    VarlenPart,
    chunk_part,
    decode_part,
    find_varlen,
    varlen_attention,
)

FindVarlen = Callable[[], VarlenAttention | None]


class PageAttention:
    """Attends for one rank, layer after layer, between `begin` calls.

    `choice` may be set between steps, until graphs are captured. `find` is asked when varlen is
    needed; None: this torch has none, and a choice that asks for it is a RuntimeError.
    """

    def __init__(
        self, *, scale: float, find: FindVarlen = find_varlen, choice: AttentionChoice = TRITON_ALONE
    ) -> None:
        self._scale = scale
        self._find = find
        self.choice = choice
        self._sequences: DeviceSequences | None = None
        self._decodes: VarlenPart | None = None
        self._chunks: VarlenPart | None = None

    def having(self, choice: AttentionChoice) -> PageAttention:
        """The same attention by another choice, with steps of its own."""
        return PageAttention(scale=self._scale, find=self._find, choice=choice)

    def begin(self, sequences: DeviceSequences) -> None:
        """Whose queries come in the next calls."""
        self._sequences = sequences
        decodes, chunks = sequences.num_decodes, sequences.num_chunks
        is_varlen_decode = decodes > 0 and self.choice.has_varlen_decode(decodes)
        self._decodes = decode_part(sequences) if is_varlen_decode else None
        self._chunks = chunk_part(sequences) if chunks and self.choice.varlen_chunks else None

    def attend(self, q_TND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[T, N, D], dense. The step's own keys and values are in the pages already."""
        assert self._sequences is not None, "begin() comes before the layers"
        decodes, chunks = self._sequences.num_decodes, self._sequences.num_chunks
        if self._decodes is not None and not chunks:
            return self._by_varlen(q_TND, keys, values, self._decodes)
        if self._chunks is not None and not decodes:
            return self._by_varlen(q_TND, keys, values, self._chunks)
        out_TND = torch.empty_like(q_TND)
        if self._decodes is not None:
            out_TND[:decodes] = self._by_varlen(q_TND[:decodes], keys, values, self._decodes)
        elif decodes:
            self._decode(q_TND, keys, values, self._sequences, out_TND)
        if self._chunks is not None:
            out_TND[decodes:] = self._by_varlen(q_TND[decodes:], keys, values, self._chunks)
        elif chunks:
            self._prefill(q_TND, keys, values, self._sequences, out_TND)
        return out_TND

    def close(self) -> None:
        """Let go of the last step's tensors."""
        self._sequences = self._decodes = self._chunks = None

    def _by_varlen(
        self, q_TND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: VarlenPart
    ) -> torch.Tensor:
        varlen = self._find()
        if varlen is None:
            raise RuntimeError("this torch has no varlen attention")
        return varlen_attention(varlen, q_TND, keys, values, part, scale=self._scale)

    def _decode(
        self,
        q_TND: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sequences: DeviceSequences,
        out_TND: torch.Tensor,
    ) -> None:
        decodes = sequences.num_decodes
        decode_attention(
            q_TND[:decodes],
            keys,
            values,
            sequences.tables_BP[:decodes],
            sequences.lengths_B[:decodes],
            out_TND[:decodes],
            scale=self._scale,
            max_context_tokens=sequences.max_context_tokens,
        )

    def _prefill(
        self,
        q_TND: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sequences: DeviceSequences,
        out_TND: torch.Tensor,
    ) -> None:
        decodes = sequences.num_decodes
        prefill_attention(
            q_TND,
            keys,
            values,
            sequences.tables_BP[decodes:],
            sequences.lengths_B[decodes:],
            sequences.starts_C1,
            out_TND,
            scale=self._scale,
            max_chunk_tokens=sequences.max_chunk_tokens,
        )
