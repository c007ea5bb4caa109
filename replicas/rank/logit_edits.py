"""What a request changes of its logits before one is drawn: penalties for tokens it has seen, biases.

In this order, for the logit x of a token that is `seen` (in prompt or answer) and came `count` times in the
answer:

    x = x / repetition_penalty if x > 0 else x * repetition_penalty        where seen
    x = x - presence_penalty (where count > 0) - frequency_penalty * count
    x = x + logit_bias

Every rank edits its own part of the vocabulary and keeps its own counts: from the history that comes with a
new row, and from what all ranks sampled since. Rows that ask for nothing are not touched, and the counts are
allocated when the first row needs them. Shape letters: R rows of the batch, S sampled rows, V local
vocabulary, M rows that are penalised, N biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from replicas.parallel.degrees import Shard
from replicas.plan import NewRow
from replicas.rank.batch import Draw


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bias:
    """The biases of one row that fall into this rank's vocabulary."""

    ids_N: torch.Tensor
    values_N: torch.Tensor


class LogitEdits:
    """Owns the counts and biases of the rows of one rank; changed by plans and by what was sampled."""

    def __init__(self, *, max_sequences: int, shard: Shard, device: torch.device) -> None:
        self._max_sequences = max_sequences
        self._shard = shard
        self._device = device
        self._biases: dict[int, _Bias] = {}
        self._penalised: set[int] = set()
        self._is_seen_RV = torch.empty(0)
        self._count_RV = torch.empty(0)

    def set_row(self, new: NewRow) -> None:
        """A sequence takes a row; whatever the row held before is forgotten."""
        self._biases.pop(new.row, None)
        self._penalised.discard(new.row)
        if new.sampling.logit_bias:
            self._biases[new.row] = self._local_bias(new.sampling.logit_bias)
        if new.sampling.has_penalties:
            self._start_counts(new)

    def apply(self, logits_SV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """The edited logits; the given ones, untouched, if no row asks for an edit."""
        penalised = [index for index, draw in enumerate(draws) if draw.row in self._penalised]
        biased = [index for index, draw in enumerate(draws) if draw.row in self._biases]
        if penalised:
            index_M = self._integers(penalised)
            edited_MV = self._penalise(
                logits_SV.index_select(0, index_M), [draws[index] for index in penalised]
            )
            logits_SV = logits_SV.index_copy(0, index_M, edited_MV)
        if biased:
            rows = [self._biases[draws[index].row] for index in biased]
            at_N = torch.cat(
                [torch.full_like(bias.ids_N, index) for index, bias in zip(biased, rows, strict=True)]
            )
            ids_N = torch.cat([bias.ids_N for bias in rows])
            values_N = torch.cat([bias.values_N for bias in rows]).to(logits_SV.dtype)
            logits_SV = logits_SV.index_put((at_N, ids_N), values_N, accumulate=True)
        return logits_SV

    def remember(self, draws: Sequence[Draw], ids_S: torch.Tensor) -> None:
        """Count what was sampled; every rank is told all ids, and counts those of its own vocabulary."""
        penalised = [index for index, draw in enumerate(draws) if draw.row in self._penalised]
        if not penalised:
            return
        rows_M = self._integers([draws[index].row for index in penalised])
        local_M = ids_S.index_select(0, self._integers(penalised)) - self._shard.vocab_start
        is_mine_M = (local_M >= 0) & (local_M < self._shard.vocab_rows)
        local_M = local_M.clamp(0, self._shard.vocab_rows - 1)
        self._count_RV.index_put_((rows_M, local_M), is_mine_M.to(torch.int32), accumulate=True)
        is_seen_M = self._is_seen_RV[rows_M, local_M] | is_mine_M
        self._is_seen_RV.index_put_((rows_M, local_M), is_seen_M)

    def _start_counts(self, new: NewRow) -> None:
        if not self._count_RV.numel():
            shape = (self._max_sequences, self._shard.vocab_rows)
            self._is_seen_RV = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._count_RV = torch.zeros(shape, dtype=torch.int32, device=self._device)
        self._penalised.add(new.row)
        start, end = self._shard.vocab_start, self._shard.vocab_start + self._shard.vocab_rows
        seen = [token_id - start for token_id in new.history if start <= token_id < end]
        answered = [token_id - start for token_id in new.history[new.num_prompt :] if start <= token_id < end]
        self._is_seen_RV[new.row].zero_().index_fill_(0, self._integers(seen), True)
        one_each = torch.ones(len(answered), dtype=torch.int32, device=self._device)
        self._count_RV[new.row].zero_().index_add_(0, self._integers(answered), one_each)

    def _penalise(self, logits_MV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
        rows_M = self._integers([draw.row for draw in draws])
        is_seen_MV = self._is_seen_RV.index_select(0, rows_M)
        count_MV = self._count_RV.index_select(0, rows_M)
        repetition_M1 = self._column([draw.sampling.repetition_penalty for draw in draws], logits_MV.dtype)
        presence_M1 = self._column([draw.sampling.presence_penalty for draw in draws], logits_MV.dtype)
        frequency_M1 = self._column([draw.sampling.frequency_penalty for draw in draws], logits_MV.dtype)
        repeated_MV = torch.where(logits_MV > 0, logits_MV / repetition_M1, logits_MV * repetition_M1)
        logits_MV = torch.where(is_seen_MV, repeated_MV, logits_MV)
        return logits_MV - presence_M1 * (count_MV > 0) - frequency_M1 * count_MV

    def _local_bias(self, logit_bias: tuple[tuple[int, float], ...]) -> _Bias:
        start, end = self._shard.vocab_start, self._shard.vocab_start + self._shard.vocab_rows
        mine = [(token_id - start, bias) for token_id, bias in logit_bias if start <= token_id < end]
        return _Bias(
            ids_N=self._integers([token_id for token_id, _ in mine]),
            values_N=torch.tensor([bias for _, bias in mine], dtype=torch.float32, device=self._device),
        )

    def _integers(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _column(self, values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device).unsqueeze(1)
