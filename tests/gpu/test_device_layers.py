"""A whole decoder on device kernels equals the torch path: prefill, chunks beside decode, foreign experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install 'wattline[gpu]')")

from replicas.attention_choice import VARLEN_ALONE
from replicas.config import ParallelConfig
from replicas.layers.attention import PagedKV
from replicas.layers.triton.layers import DeviceLayers
from replicas.layers.triton.page_attention import PageAttention
from replicas.layers.triton.sequences import DeviceSequences
from replicas.models.checkpoint import Checkpoint
from replicas.models.config_file import read_spec
from replicas.models.decoder import Decoder
from replicas.models.weights import load_weights
from replicas.parallel.collectives import SoloCollectives
from replicas.parallel.degrees import shard_of
from replicas.plan import NewRow, PlannedRow, StepPlan
from replicas.rank.batch import Batch, Rows
from replicas.request import SamplingParams
from tests.checkpoints import make_granite, make_granite_moe
from tests.varlen_reference import Recorded, varlen_reference

BLOCK_TOKENS = 4
NUM_BLOCKS = 24


class TwoPaths:
    """One rank's decoder twice over the same weights: torch leaves, and device kernels; a cache each."""

    def __init__(self, folder: Path, device: torch.device, *, expert: int = 1) -> None:
        spec = read_spec(folder)
        shard = shard_of(spec, ParallelConfig(expert=expert), expert - 1)
        with Checkpoint(folder) as checkpoint:
            weights = load_weights(
                checkpoint,
                spec,
                shard,
                device=device,
                dtype=torch.float32,
                progress=lambda stage, done, total: None,
            )
        caches = [
            PagedKV(
                num_layers=spec.num_layers,
                num_blocks=NUM_BLOCKS,
                block_tokens=BLOCK_TOKENS,
                num_kv_heads=shard.num_kv_heads,
                head_dim=spec.head_dim,
                device=device,
                dtype=torch.float32,
            )
            for _ in range(2)
        ]
        solo = SoloCollectives()
        layers = DeviceLayers(spec, shard, weights, caches[1])
        self._torch = Decoder(spec, shard, weights, caches[0], solo)
        self._kernels = Decoder(spec, shard, weights, caches[1], solo, device_layers=layers)
        self._rows = Rows(
            max_sequences=4,
            max_blocks=8,
            block_tokens=BLOCK_TOKENS,
            device=device,
            dtype=torch.float32,
        )
        self.layers = layers

    def step(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """Logits by torch and by the kernels, and the experts hit by each."""
        self._rows.apply(plan)
        batch = self._rows.batch(plan)
        expected, expected_hit = self._torch.logits(batch)
        actual, hit = self._kernels.logits(with_device_sequences(batch))
        return expected, actual, (int(expected_hit), int(hit))


def with_device_sequences(batch: Batch) -> Batch:
    sequences = DeviceSequences.from_paged(
        batch.sequences, block_tokens=BLOCK_TOKENS, device=batch.slots_T.device
    )
    return replace(batch, device_sequences=sequences)


def make_plans() -> list[StepPlan]:
    """Two prompts; then a decode beside a later chunk; then decodes of unlike lengths."""
    new_rows = tuple(NewRow(row=row, sampling=SamplingParams()) for row in (0, 1))
    first = (
        PlannedRow(row=0, start_pos=0, token_ids=tuple(range(5, 16)), new_blocks=(7, 3, 5), samples=True),
        PlannedRow(row=1, start_pos=0, token_ids=(9, 8, 7), new_blocks=(2,), samples=False),
    )
    second = (
        PlannedRow(row=1, start_pos=3, token_ids=(6, 5, 4, 3), new_blocks=(9,), samples=True),
        PlannedRow(row=0, start_pos=11, token_ids=(40,), new_blocks=(), samples=True),
    )
    third = (
        PlannedRow(row=0, start_pos=12, token_ids=(41,), new_blocks=(4,), samples=True),
        PlannedRow(row=1, start_pos=7, token_ids=(42,), new_blocks=(), samples=True),
    )
    return [
        StepPlan(step=0, freed_rows=(), new_rows=new_rows, rows=first),
        StepPlan(step=1, freed_rows=(), new_rows=(), rows=second),
        StepPlan(step=2, freed_rows=(), new_rows=(), rows=third),
    ]


@torch.inference_mode()
def test_a_dense_model_gives_the_logits_of_the_torch_path(tmp_path: Path, device: torch.device) -> None:
    paths = TwoPaths(make_granite(tmp_path), device)
    for plan in make_plans():
        expected, actual, hits = paths.step(plan)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert hits == (0, 0)


@torch.inference_mode()
def test_varlen_attention_gives_the_logits_of_the_torch_path(tmp_path: Path, device: torch.device) -> None:
    paths = TwoPaths(make_granite(tmp_path), device)
    scale = read_spec(tmp_path).attention_scale
    recorded = Recorded(varlen_reference)
    paths.layers.pages = PageAttention(scale=scale, find=lambda: recorded, choice=VARLEN_ALONE)
    for plan in make_plans():
        expected, actual, _ = paths.step(plan)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # Two layers; chunks, then decodes beside a chunk, then decodes.
    assert [args[5] for args, _ in recorded.calls] == [11, 11, 1, 4, 1, 4, 1, 1]


@torch.inference_mode()
def test_half_the_experts_give_the_partial_sums_and_the_counts_of_the_torch_path(
    tmp_path: Path, device: torch.device
) -> None:
    paths = TwoPaths(make_granite_moe(tmp_path, vocab_size=515, num_experts=4), device, expert=2)
    for plan in make_plans():
        expected, actual, hits = paths.step(plan)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert hits[0] == hits[1] > 0
        assert paths.layers.expert_counts_LX.sum(1).tolist() == [2 * plan.num_tokens] * 2


@torch.inference_mode()
@pytest.mark.parametrize("num_experts", [0, 4])
def test_one_token_alone_gives_the_logits_and_the_cache_of_the_torch_path(
    tmp_path: Path, device: torch.device, num_experts: int
) -> None:
    folder = (
        make_granite_moe(tmp_path, vocab_size=515, num_experts=num_experts)
        if num_experts
        else make_granite(tmp_path)
    )
    paths = TwoPaths(folder, device)
    first, _, third = make_plans()
    paths.step(first)
    row = third.rows[0]
    for step, start_pos in enumerate((11, 12, 13)):
        planned = replace(row, start_pos=start_pos, new_blocks=row.new_blocks if start_pos == 12 else ())
        expected, actual, hits = paths.step(replace(third, step=step, rows=(planned,)))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert hits[0] == hits[1]


@torch.inference_mode()
def test_a_broken_padding_row_touches_no_other(tmp_path: Path, device: torch.device) -> None:
    """Rows that pad a graph share scratch slot 0; whatever lies there stays theirs."""
    paths = TwoPaths(make_granite_moe(tmp_path, vocab_size=515, num_experts=4), device)
    first, _, third = make_plans()
    paths.step(first)
    paths.step(replace(third, rows=third.rows[:1]))
    for cache in (*paths.layers._kv.keys, *paths.layers._kv.values):
        cache[0] = torch.nan
    plan = StepPlan(
        step=3,
        freed_rows=(),
        new_rows=(NewRow(row=2, sampling=SamplingParams()),),
        rows=(
            PlannedRow(row=0, start_pos=13, token_ids=(43,), new_blocks=(), samples=True),
            PlannedRow(row=2, start_pos=1, token_ids=(0,), new_blocks=(0,), samples=True),
        ),
    )
    expected, actual, _ = paths.step(plan)
    assert actual[1].isnan().any()
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
