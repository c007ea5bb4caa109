"""Paged attention equals plain attention over the same tokens, wherever the pages lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from replicas.layers.attention import DecodeGroup, PagedKV, PrefillChunk, attend
from replicas.plan import LAST_SAMPLED, NewRow, PlannedRow, StepPlan
from replicas.rank.batch import Rows
from replicas.request import SamplingParams

BLOCK, N, K, D, BLOCKS = 4, 6, 2, 8, 40
CPU = torch.device("cpu")


class Stage:
    """A cache with rows, and the plain keys and values of every sequence beside it."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.kv = PagedKV(
            num_layers=1,
            num_blocks=BLOCKS,
            block_tokens=BLOCK,
            num_kv_heads=K,
            head_dim=D,
            device=CPU,
            dtype=torch.float32,
        )
        self.rows = Rows(max_sequences=4, max_blocks=16, block_tokens=BLOCK, device=CPU, dtype=torch.float32)
        self.free = torch.randperm(BLOCKS - 1, generator=self.generator).add(1).tolist()
        self.plain: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.held: dict[int, int] = {}

    def step(self, pieces: list[tuple[int, int]]) -> float:
        """Run (row, new tokens) pieces; the largest difference from plain causal attention."""
        planned, new_rows = [], []
        for row, count in pieces:
            if row not in self.plain:
                self.plain[row] = (torch.empty(0, K, D), torch.empty(0, K, D))
                self.held[row] = 0
                new_rows.append(NewRow(row=row, sampling=SamplingParams()))
            start = len(self.plain[row][0])
            missing = -(-(start + count) // BLOCK) - self.held[row]
            self.held[row] += missing
            blocks = tuple(self.free.pop() for _ in range(missing))
            planned.append(
                PlannedRow(row=row, start_pos=start, token_ids=(1,) * count, new_blocks=blocks, samples=True)
            )
        plan = StepPlan(step=1, freed_rows=(), new_rows=tuple(new_rows), rows=tuple(planned))
        self.rows.apply(plan)
        batch = self.rows.batch(plan)
        last = dict(zip((row for row, _ in pieces), batch.sampled_S.tolist(), strict=True))
        total = plan.num_tokens
        q_TND, k_TKD, v_TKD = (torch.randn(total, heads, D, generator=self.generator) for heads in (N, K, K))
        out = attend(
            self.kv, 0, q_TND, k_TKD, v_TKD, slots_T=batch.slots_T, spans=batch.spans, scale=0.3
        ).view(total, N, D)
        worst = 0.0
        for row, count in pieces:
            part = slice(last[row] + 1 - count, last[row] + 1)
            k = torch.cat((self.plain[row][0], k_TKD[part]))
            v = torch.cat((self.plain[row][1], v_TKD[part]))
            self.plain[row] = (k, v)
            mask = torch.ones(count, len(k), dtype=torch.bool).tril(len(k) - count)
            wanted = functional.scaled_dot_product_attention(
                q_TND[part].transpose(0, 1),
                k.repeat_interleave(N // K, dim=1).transpose(0, 1),
                v.repeat_interleave(N // K, dim=1).transpose(0, 1),
                attn_mask=mask,
                scale=0.3,
            ).transpose(0, 1)
            worst = max(worst, float((out[part] - wanted).abs().max()))
        return worst


def test_prefill_chunks_and_decodes_in_any_mix_equal_plain_attention() -> None:
    stage = Stage()
    steps = [
        [(0, 7)],
        [(0, 1), (1, 5)],
        [(2, 3), (0, 1), (1, 6)],
        [(0, 1), (1, 1), (2, 1)],
        [(3, 1), (2, 9), (1, 1), (0, 1)],
        [(3, 1), (2, 1), (1, 1), (0, 1)],
    ]
    for pieces in steps:
        assert stage.step(pieces) < 1e-5


def test_values_that_are_not_finite_do_not_outlive_their_sequence() -> None:
    stage = Stage()
    assert stage.step([(0, 6)]) < 1e-5
    blocks = stage.rows.blocks_of(0)
    kept = stage.kv.keys[0][blocks[0], 1].clone()
    stage.kv.keys[0][blocks[0], 0] = torch.nan
    stage.kv.values[0][blocks[1]] = torch.inf
    stage.kv.scrub(torch.tensor(blocks))
    assert all(cache.isfinite().all() for cache in (*stage.kv.keys, *stage.kv.values))
    assert torch.equal(stage.kv.keys[0][blocks[0], 1], kept)


def make_rows(*, max_sequences: int = 8, max_blocks: int = 512) -> Rows:
    return Rows(
        max_sequences=max_sequences,
        max_blocks=max_blocks,
        block_tokens=BLOCK,
        device=CPU,
        dtype=torch.float32,
    )


def decode_plan(lengths: list[int], token_id: int = 5) -> StepPlan:
    return StepPlan(
        step=1,
        freed_rows=(),
        new_rows=tuple(NewRow(row=row, sampling=SamplingParams()) for row in range(len(lengths))),
        rows=tuple(
            PlannedRow(
                row=row,
                start_pos=length - 1,
                token_ids=(token_id,),
                new_blocks=tuple(range(1, 1 + -(-length // BLOCK))),
                samples=True,
            )
            for row, length in enumerate(lengths)
        ),
    )


def test_decode_rows_of_like_length_run_together() -> None:
    rows = make_rows()
    plan = decode_plan([900, 3, 10, 5, 800, 8])
    rows.apply(plan)
    spans = rows.batch(plan).spans
    assert all(isinstance(span, DecodeGroup) for span in spans)
    assert [(span.start, span.end) for span in spans] == [(0, 3), (3, 4), (4, 5), (5, 6)]


def test_a_chunk_without_past_reads_no_pages() -> None:
    rows = make_rows()
    plan = StepPlan(
        step=1,
        freed_rows=(),
        new_rows=(NewRow(row=2, sampling=SamplingParams(seed=9)),),
        rows=(PlannedRow(row=2, start_pos=0, token_ids=(7, 8, 9), new_blocks=(3,), samples=True),),
    )
    rows.apply(plan)
    batch = rows.batch(plan)
    assert batch.spans == (PrefillChunk(start=0, end=3),)
    assert batch.slots_T.tolist() == [12, 13, 14]
    assert batch.sampled_S.tolist() == [2]
    assert (batch.draws[0].row, batch.draws[0].position, batch.draws[0].sampling.seed) == (2, 3, 9)


def test_a_placeholder_stands_for_the_last_sampled_id_of_its_row() -> None:
    rows = make_rows()
    plan = decode_plan([4, 9])
    rows.apply(plan)
    batch = rows.batch(plan)
    rows.remember(batch.draws, torch.tensor([41, 42]))
    later = StepPlan(
        step=2,
        freed_rows=(),
        new_rows=(),
        rows=(
            PlannedRow(row=1, start_pos=9, token_ids=(LAST_SAMPLED,), new_blocks=(), samples=True),
            PlannedRow(row=0, start_pos=4, token_ids=(6,), new_blocks=(8,), samples=True),
        ),
    )
    rows.apply(later)
    batch = rows.batch(later)
    by_position = dict(zip(batch.positions_T.tolist(), batch.token_ids_T.tolist(), strict=True))
    assert by_position == {9: 42, 4: 6}
    assert [draw.row for draw in batch.draws] == [1, 0]


def test_a_row_is_taken_and_freed_in_turn() -> None:
    rows = make_rows()
    plan = decode_plan([4])
    rows.apply(plan)
    with pytest.raises(AssertionError, match="which is taken"):
        rows.apply(plan)
    rows.apply(StepPlan(step=2, freed_rows=(0,), new_rows=(), rows=()))
    assert rows.blocks_of(0) == []
    with pytest.raises(AssertionError, match="which is free"):
        rows.apply(StepPlan(step=3, freed_rows=(0,), new_rows=(), rows=()))


def test_the_bias_hides_what_lies_beyond_a_row() -> None:
    rows = make_rows()
    plan = decode_plan([3, 5])
    rows.apply(plan)
    (group,) = rows.batch(plan).spans
    assert isinstance(group, DecodeGroup)
    assert group.bias_B11L is not None
    wanted = np.array([[0, 0, 0, -np.inf, -np.inf], [0, 0, 0, 0, 0]], dtype=np.float32)
    assert np.array_equal(group.bias_B11L[:, 0, 0].numpy(), wanted)
