"""The rows of a rank on its device: block tables and last sampled ids that stay there, and batches over them.

The host keeps its own tables (`batch.Rows`) and tells the device only what changed, within the one upload of
a step. Shape letters: R rows of the rank and one of padding, P pages of a table, T tokens of the step,
S sampled tokens, B sequences of the step, C prefill chunks, L cached tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from replicas.layers.attention import DecodeGroup, PagedSequences, PrefillChunk, Span
from replicas.layers.triton.sequences import DeviceSequences
from replicas.plan import LAST_SAMPLED, StepPlan
from replicas.rank.batch import Batch, FlatStep, Ints, Rows, decode_groups
from replicas.rank.transfer import Part, Upload

_NO_SEQUENCES = PagedSequences(
    rows_B4=np.zeros((0, 4), dtype=np.int64), tables=np.zeros((0, 0), dtype=np.int64)
)
"""What compiled CPU kernels would read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedBatch:
    """A step whose tokens run from the host, on its way to the device."""

    flat: FlatStep
    words_4T: Part
    sampled_S: Part
    rows_B: Part
    lengths_B: Part
    starts_C1: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedBlocks:
    """Blocks to append to tables: where in the flat tables, and which."""

    at_N: Part
    blocks_N: Part


class DeviceRows:
    """Owns the tables and the last ids on the device. Row `padding_row` has no blocks but scratch."""

    def __init__(
        self,
        rows: Rows,
        *,
        max_sequences: int,
        max_blocks: int,
        block_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device = device
        self._rows = rows
        self._max_blocks = max_blocks
        self._block_tokens = block_tokens
        self._dtype = dtype
        self.padding_row = max_sequences
        self._tables_RP = torch.zeros((max_sequences + 1, max_blocks), dtype=torch.int32, device=device)
        self._last_ids_R = torch.zeros(max_sequences + 1, dtype=torch.int64, device=device)

    def stage_blocks(self, plan: StepPlan, upload: Upload) -> StagedBlocks | None:
        """The blocks of an applied plan that the device has not heard of."""
        at: list[int] = []
        blocks: list[int] = []
        for planned in plan.rows:
            end = planned.row * self._max_blocks + self._rows.num_blocks_of(planned.row)
            at += range(end - len(planned.new_blocks), end)
            blocks += planned.new_blocks
        if not blocks:
            return None
        return StagedBlocks(at_N=upload.integers(at), blocks_N=upload.add(np.asarray(blocks, dtype=np.int32)))

    def append(self, staged: StagedBlocks | None) -> None:
        if staged is not None:
            self._tables_RP.view(-1).index_copy_(0, staged.at_N.tensor, staged.blocks_N.tensor)

    def remember(self, rows_S: torch.Tensor, ids_S: torch.Tensor) -> None:
        """Keep the sampled ids, for rows whose next token is still a placeholder in the next plan."""
        # A row without finite logits has id -1; it will be dropped, but until then needs a real token.
        self._last_ids_R.index_copy_(0, rows_S, ids_S.clamp(min=0))

    def token_ids(self, ids_T: torch.Tensor, rows_T: torch.Tensor) -> torch.Tensor:
        """`ids_T`, with the row's last sampled id in place of LAST_SAMPLED."""
        return torch.where(ids_T == LAST_SAMPLED, self._last_ids_R.index_select(0, rows_T), ids_T)

    def stage(self, flat: FlatStep, upload: Upload) -> StagedBatch:
        chunks = flat.ordered[flat.num_decodes :]
        starts = [
            end - len(row.token_ids) for row, end in zip(chunks, flat.ends[flat.num_decodes :], strict=True)
        ]
        words_4T: Ints = np.stack((flat.token_ids_T, flat.positions_T, flat.slots_T, flat.rows_T))
        lengths = [row.start_pos + len(row.token_ids) for row in flat.ordered]
        return StagedBatch(
            flat=flat,
            words_4T=upload.add(words_4T),
            sampled_S=upload.integers(flat.sampled),
            rows_B=upload.integers([row.row for row in flat.ordered]),
            lengths_B=upload.add(np.asarray(lengths, dtype=np.int32)),
            starts_C1=upload.add(np.asarray([*starts, len(flat.rows_T)], dtype=np.int32)),
        )

    def batch(self, staged: StagedBatch, *, has_spans: bool) -> Batch:
        """The tensors of a step whose upload was sent."""
        flat = staged.flat
        ids_T, positions_T, slots_T, rows_T = staged.words_4T.tensor.unbind(0)
        lengths = [row.start_pos + len(row.token_ids) for row in flat.ordered]
        longest = max(lengths)
        num_pages = -(-longest // self._block_tokens)
        tables_BP = self._tables_RP.index_select(0, staged.rows_B.tensor)[:, :num_pages]
        chunk_tokens = [len(row.token_ids) for row in flat.ordered[flat.num_decodes :]]
        return Batch(
            token_ids_T=self.token_ids(ids_T, rows_T),
            positions_T=positions_T,
            slots_T=slots_T,
            spans=self._spans(flat, tables_BP, positions_T) if has_spans else (),
            sequences=_NO_SEQUENCES,
            device_sequences=DeviceSequences(
                tables_BP=tables_BP,
                lengths_B=staged.lengths_B.tensor,
                starts_C1=staged.starts_C1.tensor,
                num_decodes=flat.num_decodes,
                max_chunk_tokens=max(chunk_tokens, default=0),
                max_context_tokens=longest,
            ),
            sampled_S=staged.sampled_S.tensor,
            draws=flat.draws,
            targets=flat.targets,
        )

    def decode_batch(
        self,
        ids_B: torch.Tensor,
        positions_B: torch.Tensor,
        slots_B: torch.Tensor,
        rows_B: torch.Tensor,
        *,
        has_spans: bool,
    ) -> Batch:
        """A step of decode rows alone, all of which are sampled; shapes depend on their number alone."""
        num_rows, device = len(ids_B), ids_B.device
        most_tokens = self._max_blocks * self._block_tokens
        tables_BP = self._tables_RP.index_select(0, rows_B)
        spans: tuple[Span, ...] = ()
        if has_spans:
            bias_BL = self._beyond(positions_B, most_tokens)
            group = DecodeGroup(
                start=0,
                end=num_rows,
                blocks_BP=tables_BP,
                num_cached=most_tokens,
                bias_B11L=bias_BL[:, None, None, :],
            )
            spans = (group,)
        return Batch(
            token_ids_T=self.token_ids(ids_B, rows_B),
            positions_T=positions_B,
            slots_T=slots_B,
            spans=spans,
            sequences=_NO_SEQUENCES,
            device_sequences=DeviceSequences(
                tables_BP=tables_BP,
                lengths_B=(positions_B + 1).to(torch.int32),
                starts_C1=torch.full((1,), num_rows, dtype=torch.int32, device=device),
                num_decodes=num_rows,
                max_chunk_tokens=0,
                max_context_tokens=most_tokens,
            ),
            sampled_S=torch.arange(num_rows, device=device),
            draws=(),
        )

    def _spans(self, flat: FlatStep, tables_BP: torch.Tensor, positions_T: torch.Tensor) -> tuple[Span, ...]:
        """What torch attends to: like contexts in groups, then chunks."""
        spans: list[Span] = []
        for start, end in decode_groups(
            flat.ordered[: flat.num_decodes],
            block_tokens=self._block_tokens,
            most_tokens=len(tables_BP) * self._max_blocks * self._block_tokens,
        ):
            num_cached = flat.ordered[end - 1].start_pos + 1
            is_ragged = flat.ordered[start].start_pos + 1 < num_cached
            spans.append(
                DecodeGroup(
                    start=start,
                    end=end,
                    blocks_BP=tables_BP[start:end, : self._num_pages(num_cached)],
                    num_cached=num_cached,
                    bias_B11L=self._beyond(positions_T[start:end], num_cached)[:, None, None, :]
                    if is_ragged
                    else None,
                )
            )
        for index in range(flat.num_decodes, len(flat.ordered)):
            row, end = flat.ordered[index], flat.ends[index]
            start = end - len(row.token_ids)
            if row.start_pos == 0:
                spans.append(PrefillChunk(start=start, end=end))
                continue
            num_cached = row.start_pos + len(row.token_ids)
            spans.append(
                PrefillChunk(
                    start=start,
                    end=end,
                    blocks_P=tables_BP[index, : self._num_pages(num_cached)],
                    num_cached=num_cached,
                    bias_TL=self._beyond(positions_T[start:end], num_cached),
                )
            )
        return tuple(spans)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def _beyond(self, positions_T: torch.Tensor, num_cached: int) -> torch.Tensor:
        """[T, L]: 0 where a token may look, -inf at positions after its own."""
        is_hidden_TL = torch.arange(num_cached, device=positions_T.device) > positions_T.unsqueeze(1)
        bias_TL = torch.zeros(is_hidden_TL.shape, dtype=self._dtype, device=positions_T.device)
        return bias_TL.masked_fill_(is_hidden_TL, -torch.inf)
