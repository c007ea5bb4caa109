"""From a step plan to tensors: the rows of a rank, and the flat batch of a step.

`Rows` is the rank's memory between plans: block tables, sampling parameters, last sampled tokens. Every rank
keeps its own copy and applies the same plans. Flat order: decode rows by context, then prefill chunks.
Shape letters: T tokens of the step, S sampled tokens, B rows of a decode group, P pages, L cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from replicas.layers.attention import DecodeGroup, PagedSequences, PrefillChunk, Span
from replicas.layers.triton.sequences import DeviceSequences
from replicas.plan import LAST_SAMPLED, PlannedRow, StepPlan
from replicas.record import record
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


@record
class Target:
    """A known token that is scored, for a row that asks for `sampling.num_logprobs` beside it."""

    token_id: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The tensors of a step. `sampled_S[i]` is the flat index of the token that `draws[i]` continues.

    Behind those of the draws are the indices of tokens whose next one, in `targets`, is known and scored.
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
    targets: tuple[Target, ...] = ()
    lane_tokens: tuple[int, ...] = ()
    """In the `dispatch` layout: the tokens of every rank in this step; this one may have none."""
    device_sequences: DeviceSequences | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatStep:
    """A step on the host: rows in flat order, `num_decodes` of one token each first, and their tokens.

    Row i of `ordered` ends before flat token `ends[i]`. Token ids may be LAST_SAMPLED. `sampled` holds a flat
    index for each of `draws`, which are in the order of the plan, and behind them one for each of `targets`.
    """

    ordered: list[PlannedRow]
    num_decodes: int
    ends: list[int]
    token_ids_T: Ints
    positions_T: Ints
    slots_T: Ints
    rows_T: Ints
    sampled: list[int]
    draws: tuple[Draw, ...]
    targets: tuple[Target, ...] = ()


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
        self._doubtful: set[int] = set()
        """Rows whose cache may hold what is not finite. Torch multiplies what it masks, so whoever gets their
        blocks next must not find it there."""

    def apply(self, plan: StepPlan) -> None:
        """Free rows, set new ones, append blocks: all of a plan but its tokens."""
        for row in plan.freed_rows:
            assert self._sampling[row] is not None, f"step {plan.step} frees row {row}, which is free"
            self._sampling[row] = None
            # Torch reads a row's table up to the longest of its group: beyond its own it finds scratch.
            self._tables[row, : self._num_blocks[row]] = 0
            self._num_blocks[row] = 0
        for new in plan.new_rows:
            assert self._sampling[new.row] is None, f"step {plan.step} sets row {new.row}, which is taken"
            self._sampling[new.row] = new.sampling
        for planned in plan.rows:
            if not planned.samples and self._has_spans:
                self._doubtful.add(planned.row)
            if planned.new_blocks:
                held = self._num_blocks[planned.row]
                self._num_blocks[planned.row] = held + len(planned.new_blocks)
                self._tables[planned.row, held : self._num_blocks[planned.row]] = planned.new_blocks

    def num_blocks_of(self, row: int) -> int:
        return self._num_blocks[row]

    def blocks_of(self, row: int) -> list[int]:
        return [int(block) for block in self._tables[row, : self._num_blocks[row]]]

    @property
    def has_doubts(self) -> bool:
        """Whether any finite logits are worth a note."""
        return bool(self._doubtful)

    def note_logits(self, row: int, *, are_finite: bool) -> None:
        """They come of all that the row has in the cache, and prove it, or not."""
        (self._doubtful.discard if are_finite else self._doubtful.add)(row)

    def take_doubtful_blocks(self, freed_rows: tuple[int, ...]) -> list[int]:
        """To be scrubbed before these rows are freed. What others share is theirs: it fails them, too."""
        left = self._doubtful.intersection(freed_rows)
        if not left:
            return []
        self._doubtful -= left
        staying = set(range(len(self._num_blocks))).difference(freed_rows)
        kept = {block for row in staying for block in self.blocks_of(row)}
        return sorted({block for row in left for block in self.blocks_of(row)} - kept)

    def remember(self, draws: tuple[Draw, ...], ids_S: torch.Tensor) -> None:
        """Keep the sampled ids, for rows whose next token is still a placeholder in the next plan."""
        rows = self._to_device([draw.row for draw in draws])
        # A row without finite logits has id -1; it will be dropped, but until then needs a real token.
        self._last_ids.index_copy_(0, rows, ids_S.clamp(min=0))

    def flatten(self, plan: StepPlan) -> FlatStep:
        """The flat tokens of an applied plan, on the host."""
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
        sampled_ends = [last_index[row.row] for row in sampled]
        scored_ends, targets = self._targets(plan, ordered, ends) if plan.scored else ([], ())
        ids = [token_id for row in ordered for token_id in row.token_ids]
        return FlatStep(
            ordered=ordered,
            num_decodes=len(decodes),
            ends=ends,
            token_ids_T=np.asarray(ids, dtype=np.int64),
            positions_T=positions,
            slots_T=slots,
            rows_T=rows,
            sampled=sampled_ends + scored_ends,
            draws=tuple(self._draw(row) for row in sampled),
            targets=targets,
        )

    def batch(self, plan: StepPlan, lane_tokens: tuple[int, ...] = ()) -> Batch:
        """The tensors of an applied plan."""
        if not plan.rows:
            return self._idle_batch(lane_tokens)
        flat = self.flatten(plan)
        decodes, chunks = flat.ordered[: flat.num_decodes], flat.ordered[flat.num_decodes :]
        spans: list[Span] = []
        if self._has_spans:
            groups = decode_groups(decodes, block_tokens=self._block_tokens, most_tokens=self._group_tokens)
            spans += [self._decode_group(decodes[start:end], start) for start, end in groups]
            spans += [
                self._chunk(row, end) for row, end in zip(chunks, flat.ends[flat.num_decodes :], strict=True)
            ]
        return Batch(
            token_ids_T=self._token_ids(flat),
            positions_T=self._to_device(flat.positions_T),
            slots_T=self._to_device(flat.slots_T),
            spans=tuple(spans),
            sequences=self._sequences(flat.ordered, flat.ends),
            sampled_S=self._to_device(flat.sampled),
            draws=flat.draws,
            targets=flat.targets,
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

    def _targets(
        self, plan: StepPlan, ordered: list[PlannedRow], ends: list[int]
    ) -> tuple[list[int], tuple[Target, ...]]:
        """The flat indices of the tokens that are scored by, and what follows each of them."""
        places = {row.row: (row, end) for row, end in zip(ordered, ends, strict=True)}
        indices: list[int] = []
        targets: list[Target] = []
        for scored in plan.scored:
            row, end = places[scored.row]
            start, followers = end - len(row.token_ids), scored.targets(row.token_ids)
            indices += range(start, start + len(followers))
            sampling = self._sampling_of(row.row)
            targets += [Target(token_id=token_id, sampling=sampling) for token_id in followers]
        return indices, tuple(targets)

    def _sequences(self, ordered: list[PlannedRow], ends: list[int]) -> PagedSequences:
        rows = [
            (end - len(row.token_ids), len(row.token_ids), row.start_pos, row.row)
            for row, end in zip(ordered, ends, strict=True)
        ]
        return PagedSequences(rows_B4=np.asarray(rows, dtype=np.int64), tables=self._tables)

    def _sampling_of(self, row: int) -> SamplingParams:
        sampling = self._sampling[row]
        assert sampling is not None, f"row {row} runs, but is free"
        return sampling

    def _draw(self, row: PlannedRow) -> Draw:
        sampling = self._sampling_of(row.row)
        return Draw(row=row.row, sampling=sampling, position=row.start_pos + len(row.token_ids))

    def _token_ids(self, flat: FlatStep) -> torch.Tensor:
        ids_T = self._to_device(flat.token_ids_T)
        if LAST_SAMPLED not in flat.token_ids_T:
            return ids_T
        last_T = self._last_ids.index_select(0, self._to_device(flat.rows_T))
        return torch.where(ids_T == LAST_SAMPLED, last_T, ids_T)

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


def decode_groups(
    decodes: Sequence[PlannedRow], *, block_tokens: int, most_tokens: int
) -> list[tuple[int, int]]:
    """Spans of rows, sorted by context, of like context: as many as fit the padded size, none twice as long
    as another."""
    groups: list[tuple[int, int]] = []
    start = 0
    while start < len(decodes):
        end = start + 1
        while end < len(decodes):
            longest = decodes[end].start_pos + 1
            is_alike = longest <= 2 * (decodes[start].start_pos + 1) or longest <= 2 * block_tokens
            if not is_alike or longest * (end + 1 - start) > most_tokens:
                break
            end += 1
        groups.append((start, end))
        start = end
    return groups
