"""From a step plan to tensors: the rows of a rank, and the flat batch of a step.

`Rows` is the rank's memory between plans: block tables, sampling parameters, last sampled tokens. Every rank
keeps its own copy and applies the same plans. Flat order: decode rows by context, then prefill chunks.
Shape letters: T tokens of the step, S sampled tokens, B rows of a decode group, P pages, L cached tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from replicas.layers.attention import DecodeGroup, PagedSequences, PrefillChunk, Span
from replicas.layers.triton.sequences import DeviceSequences
from replicas.plan import LAST_SAMPLED, PlannedRow, StepPlan
from replicas.request import SamplingParams

Ints = npt.NDArray[np.int64]

GROUP_TOKENS_CPU = 1024
"""Padded context of one decode group on a CPU: larger gathers fall out of the cache and cost 1.5-4x."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """A token to be sampled: for which row, how, and the position that keys its randomness."""

    row: int
    sampling: SamplingParams
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The tensors of a step. `sampled_S[i]` is the flat index of the token that `draws[i]` continues.

    `spans` and `sequences` say the same; compiled kernels read the second, and then the first is empty. So do
    `device_sequences`, which device kernels read in place of both.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    spans: tuple[Span, ...]
    sequences: PagedSequences
    sampled_S: torch.Tensor
    draws: tuple[Draw, ...]
    lane_tokens: tuple[int, ...] = ()
    """In the `dispatch` layout: the tokens of every rank in this step; this one may have none."""
    device_sequences: DeviceSequences | None = None


class Rows:
    """What a rank remembers of the sequences in its batch; changed by plans alone."""

    def __init__(
        self,
        *,
        max_sequences: int,
        max_blocks: int,
        block_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        has_spans: bool = True,
    ) -> None:
        self._has_spans = has_spans
        self._block_tokens = block_tokens
        self._device = device
        self._dtype = dtype
        self._group_tokens = (
            GROUP_TOKENS_CPU if device.type == "cpu" else max_sequences * max_blocks * block_tokens
        )
        self._tables: Ints = np.zeros((max_sequences, max_blocks), dtype=np.int64)
        self._num_blocks = [0] * max_sequences
        self._sampling: list[SamplingParams | None] = [None] * max_sequences
        self._last_ids = torch.zeros(max_sequences, dtype=torch.int64, device=device)

    def apply(self, plan: StepPlan) -> None:
        """Free rows, set new ones, append blocks: all of a plan but its tokens."""
        for row in plan.freed_rows:
            assert self._sampling[row] is not None, f"step {plan.step} frees row {row}, which is free"
            self._sampling[row] = None
            self._num_blocks[row] = 0
        for new in plan.new_rows:
            assert self._sampling[new.row] is None, f"step {plan.step} sets row {new.row}, which is taken"
            self._sampling[new.row] = new.sampling
        for planned in plan.rows:
            if planned.new_blocks:
                held = self._num_blocks[planned.row]
                self._num_blocks[planned.row] = held + len(planned.new_blocks)
                self._tables[planned.row, held : self._num_blocks[planned.row]] = planned.new_blocks

    def blocks_of(self, row: int) -> list[int]:
        return [int(block) for block in self._tables[row, : self._num_blocks[row]]]

    def remember(self, draws: tuple[Draw, ...], ids_S: torch.Tensor) -> None:
        """Keep the sampled ids, for rows whose next token is still a placeholder in the next plan."""
        rows = self._to_device([draw.row for draw in draws])
        # A row without finite logits has id -1; it will be dropped, but until then needs a real token.
        self._last_ids.index_copy_(0, rows, ids_S.clamp(min=0))

    def batch(self, plan: StepPlan, lane_tokens: tuple[int, ...] = ()) -> Batch:
        """The tensors of an applied plan."""
        if not plan.rows:
            return self._idle_batch(lane_tokens)
        decodes = [row for row in plan.rows if len(row.token_ids) == 1]
        decodes.sort(key=lambda row: row.start_pos)
        chunks = [row for row in plan.rows if len(row.token_ids) > 1]
        ordered = decodes + chunks
        rows: Ints = np.repeat([row.row for row in ordered], [len(row.token_ids) for row in ordered])
        positions: Ints = np.concatenate(
            [np.arange(row.start_pos, row.start_pos + len(row.token_ids)) for row in ordered]
        )
        page_tokens = self._block_tokens
        slots: Ints = self._tables[rows, positions // page_tokens] * page_tokens + positions % page_tokens
        ends = np.cumsum([len(row.token_ids) for row in ordered]).tolist()
        last_index = {row.row: end - 1 for row, end in zip(ordered, ends, strict=True)}
        sampled = [row for row in plan.rows if row.samples]
        spans: list[Span] = []
        if self._has_spans:
            spans += self._decode_groups(decodes)
            spans += [self._chunk(row, end) for row, end in zip(chunks, ends[len(decodes) :], strict=True)]
        return Batch(
            token_ids_T=self._token_ids(ordered, rows),
            positions_T=self._to_device(positions),
            slots_T=self._to_device(slots),
            spans=tuple(spans),
            sequences=self._sequences(ordered, ends),
            sampled_S=self._to_device([last_index[row.row] for row in sampled]),
            draws=tuple(self._draw(row) for row in sampled),
            lane_tokens=lane_tokens,
        )

    def _idle_batch(self, lane_tokens: tuple[int, ...]) -> Batch:
        """A step in which only other ranks have rows."""
        nothing = self._to_device([])
        return Batch(
            token_ids_T=nothing,
            positions_T=nothing,
            slots_T=nothing,
            spans=(),
            sequences=self._sequences([], []),
            sampled_S=nothing,
            draws=(),
            lane_tokens=lane_tokens,
        )

    def _sequences(self, ordered: list[PlannedRow], ends: list[int]) -> PagedSequences:
        rows = [
            (end - len(row.token_ids), len(row.token_ids), row.start_pos, row.row)
            for row, end in zip(ordered, ends, strict=True)
        ]
        return PagedSequences(rows_B4=np.asarray(rows, dtype=np.int64), tables=self._tables)

    def _draw(self, row: PlannedRow) -> Draw:
        sampling = self._sampling[row.row]
        assert sampling is not None, f"row {row.row} runs, but is free"
        return Draw(row=row.row, sampling=sampling, position=row.start_pos + len(row.token_ids))

    def _token_ids(self, ordered: list[PlannedRow], rows: Ints) -> torch.Tensor:
        ids = [token_id for row in ordered for token_id in row.token_ids]
        ids_T = self._to_device(ids)
        if LAST_SAMPLED not in ids:
            return ids_T
        last_T = self._last_ids.index_select(0, self._to_device(rows))
        return torch.where(ids_T == LAST_SAMPLED, last_T, ids_T)

    def _decode_groups(self, decodes: list[PlannedRow]) -> list[Span]:
        """Rows of like context together: as many as fit the padded size, none twice as long as another."""
        groups: list[Span] = []
        start = 0
        while start < len(decodes):
            end = start + 1
            while end < len(decodes):
                longest = decodes[end].start_pos + 1
                is_alike = longest <= 2 * (decodes[start].start_pos + 1) or longest <= 2 * self._block_tokens
                if not is_alike or longest * (end + 1 - start) > self._group_tokens:
                    break
                end += 1
            groups.append(self._decode_group(decodes[start:end], start))
            start = end
        return groups

    def _decode_group(self, rows: list[PlannedRow], start: int) -> DecodeGroup:
        lengths = [row.start_pos + 1 for row in rows]
        num_cached = lengths[-1]
        num_pages = -(-num_cached // self._block_tokens)
        bias = None
        if lengths[0] != num_cached:
            beyond_BL = np.arange(num_cached) >= np.asarray(lengths)[:, None]
            bias = self._bias(beyond_BL)[:, None, None, :]
        return DecodeGroup(
            start=start,
            end=start + len(rows),
            blocks_BP=self._to_device(self._tables[[row.row for row in rows], :num_pages]),
            num_cached=num_cached,
            bias_B11L=bias,
        )

    def _chunk(self, row: PlannedRow, end: int) -> PrefillChunk:
        num_tokens = len(row.token_ids)
        if row.start_pos == 0:
            return PrefillChunk(start=end - num_tokens, end=end)
        num_cached = row.start_pos + num_tokens
        positions = np.arange(row.start_pos, num_cached)
        return PrefillChunk(
            start=end - num_tokens,
            end=end,
            blocks_P=self._to_device(self._tables[row.row, : -(-num_cached // self._block_tokens)]),
            num_cached=num_cached,
            bias_TL=self._bias(np.arange(num_cached) > positions[:, None]),
        )

    def _bias(self, is_hidden: npt.NDArray[np.bool_]) -> torch.Tensor:
        """0 where attention may look, -inf where not."""
        hidden = torch.from_numpy(is_hidden).to(self._device, non_blocking=True)
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(
            hidden, -torch.inf
        )

    def _to_device(self, values: Ints | list[int]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self._device, non_blocking=True)
