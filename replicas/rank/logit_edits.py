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
from replicas.rank.transfer import Part, Upload


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """A row that begins to count: the local ids of its history, and of the answer in it."""

    row: int
    seen_N: Part
    answered_N: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Penalised:
    """The draws that are penalised: which, of which rows, and how strongly."""

    index_M: Part
    rows_M: Part
    repetition_M1: Part
    presence_M1: Part
    frequency_M1: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Biased:
    """What is added where, over all draws that have biases in this rank's vocabulary."""

    at_N: Part
    ids_N: Part
    values_N: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """What a step changes of its logits, staged for the device."""

    starts: tuple[_Start, ...] = ()
    penalised: _Penalised | None = None
    biased: _Biased | None = None


class LogitEdits:
    """Owns the counts and biases of the rows of one rank; changed by plans and by what was sampled.

    Per step: `set_row` for every new row, `stage`, the upload, `apply`, and `remember` what was sampled.
    """

    def __init__(self, *, max_sequences: int, shard: Shard, device: torch.device) -> None:
        self._max_sequences = max_sequences
        self._shard = shard
        self._device = device
        self._biases: dict[int, tuple[tuple[int, float], ...]] = {}
        self._penalised: set[int] = set()
        self._starting: dict[int, NewRow] = {}
        self._is_seen_RV = torch.empty(0)
        self._count_RV = torch.empty(0)

    def set_row(self, new: NewRow) -> None:
        """A sequence takes a row; whatever the row held before is forgotten."""
        self._biases.pop(new.row, None)
        self._penalised.discard(new.row)
        self._starting.pop(new.row, None)
        start, end = self._shard.vocab_start, self._shard.vocab_start + self._shard.vocab_rows
        mine = tuple(
            (token_id - start, by) for token_id, by in new.sampling.logit_bias if start <= token_id < end
        )
        if mine:
            self._biases[new.row] = mine
        if new.sampling.has_penalties:
            self._penalised.add(new.row)
            self._starting[new.row] = new

    def stage(self, draws: Sequence[Draw], upload: Upload) -> Edits:
        """What `apply` and `remember` need, on its way to the device: of new rows, and of `draws`."""
        starts = tuple(self._stage_start(new, upload) for new in self._starting.values())
        self._starting.clear()
        return Edits(
            starts=starts,
            penalised=self._stage_penalised(draws, upload),
            biased=self._stage_biased(draws, upload),
        )

    def apply(self, logits_SV: torch.Tensor, edits: Edits) -> torch.Tensor:
        """The edited logits; the given ones, untouched, if no row asks for an edit."""
        for start in edits.starts:
            self._start_counts(start)
        if edits.penalised is not None:
            index_M = edits.penalised.index_M.tensor
            edited_MV = self._penalise(logits_SV.index_select(0, index_M), edits.penalised)
            logits_SV = logits_SV.index_copy(0, index_M, edited_MV)
        if edits.biased is not None:
            at = (edits.biased.at_N.tensor, edits.biased.ids_N.tensor)
            values_N = edits.biased.values_N.tensor.to(logits_SV.dtype)
            logits_SV = logits_SV.index_put(at, values_N, accumulate=True)
        return logits_SV

    def remember(self, edits: Edits, ids_S: torch.Tensor) -> None:
        """Count what was sampled; every rank is told all ids, and counts those of its own vocabulary."""
        if edits.penalised is None:
            return
        rows_M = edits.penalised.rows_M.tensor
        local_M = ids_S.index_select(0, edits.penalised.index_M.tensor) - self._shard.vocab_start
        is_mine_M = (local_M >= 0) & (local_M < self._shard.vocab_rows)
        local_M = local_M.clamp(0, self._shard.vocab_rows - 1)
        self._count_RV.index_put_((rows_M, local_M), is_mine_M.to(torch.int32), accumulate=True)
        is_seen_M = self._is_seen_RV[rows_M, local_M] | is_mine_M
        self._is_seen_RV.index_put_((rows_M, local_M), is_seen_M)

    def _stage_start(self, new: NewRow, upload: Upload) -> _Start:
        start, end = self._shard.vocab_start, self._shard.vocab_start + self._shard.vocab_rows
        seen = [token_id - start for token_id in new.history if start <= token_id < end]
        answered = [token_id - start for token_id in new.history[new.num_prompt :] if start <= token_id < end]
        return _Start(row=new.row, seen_N=upload.integers(seen), answered_N=upload.integers(answered))

    def _stage_penalised(self, draws: Sequence[Draw], upload: Upload) -> _Penalised | None:
        index = [index for index, draw in enumerate(draws) if draw.row in self._penalised]
        if not index:
            return None
        samplings = [draws[at].sampling for at in index]
        return _Penalised(
            index_M=upload.integers(index),
            rows_M=upload.integers([draws[at].row for at in index]),
            repetition_M1=upload.floats([[sampling.repetition_penalty] for sampling in samplings]),
            presence_M1=upload.floats([[sampling.presence_penalty] for sampling in samplings]),
            frequency_M1=upload.floats([[sampling.frequency_penalty] for sampling in samplings]),
        )

    def _stage_biased(self, draws: Sequence[Draw], upload: Upload) -> _Biased | None:
        biases = [
            (index, token_id, by)
            for index, draw in enumerate(draws)
            for token_id, by in self._biases.get(draw.row, ())
        ]
        if not biases:
            return None
        at, ids, values = zip(*biases, strict=True)
        return _Biased(at_N=upload.integers(at), ids_N=upload.integers(ids), values_N=upload.floats(values))

    def _start_counts(self, start: _Start) -> None:
        if not self._count_RV.numel():
            shape = (self._max_sequences, self._shard.vocab_rows)
            self._is_seen_RV = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._count_RV = torch.zeros(shape, dtype=torch.int32, device=self._device)
        answered_N = start.answered_N.tensor
        self._is_seen_RV[start.row].zero_().index_fill_(0, start.seen_N.tensor, True)
        one_each = torch.ones_like(answered_N, dtype=torch.int32)
        self._count_RV[start.row].zero_().index_add_(0, answered_N, one_each)

    def _penalise(self, logits_MV: torch.Tensor, penalised: _Penalised) -> torch.Tensor:
        rows_M = penalised.rows_M.tensor
        is_seen_MV = self._is_seen_RV.index_select(0, rows_M)
        count_MV = self._count_RV.index_select(0, rows_M)
        repetition_M1, presence_M1, frequency_M1 = (
            column.tensor.to(logits_MV.dtype)
            for column in (penalised.repetition_M1, penalised.presence_M1, penalised.frequency_M1)
        )
        repeated_MV = torch.where(logits_MV > 0, logits_MV / repetition_M1, logits_MV * repetition_M1)
        logits_MV = torch.where(is_seen_MV, repeated_MV, logits_MV)
        return logits_MV - presence_M1 * (count_MV > 0) - frequency_M1 * count_MV
