"""The device draws the tokens that the torch sampler draws: same noise, same ties, same NaN."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install 'wattline[gpu]')")

from replicas.layers.triton.sample import best_tokens
from replicas.parallel.collectives import SoloCollectives
from replicas.parallel.degrees import Shard
from replicas.rank.batch import Draw
from replicas.rank.sampler import NOT_FINITE, row_keys, sample
from replicas.request import SamplingParams

VOCAB = 5008
VALID = 5003


def make_shard() -> Shard:
    return Shard(
        rank=0,
        vocab_ranks=1,
        head_start=0,
        num_heads=1,
        kv_head_start=0,
        num_kv_heads=1,
        ffn_start=0,
        ffn_size=1,
        expert_start=0,
        num_experts=0,
        vocab_start=0,
        vocab_rows=VOCAB,
        vocab_valid=VALID,
        is_attention_split=False,
        is_ffn_split=False,
    )


def make_logits(rows: int, device: torch.device) -> torch.Tensor:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3))
    logits[:, VALID:] = -torch.inf
    return logits.to(device)


def test_greedy_and_warm_rows_draw_what_the_torch_sampler_draws(device: torch.device) -> None:
    draws = [
        Draw(row=row, sampling=SamplingParams(temperature=temperature, seed=row + 1), position=7 * row)
        for row, temperature in enumerate((0.0, 1.0, 0.3, 5.0, 0.0, 1.7))
    ]
    logits = make_logits(len(draws), device)
    logits[4, 100] = torch.nan
    expected = sample(logits.clone(), draws, make_shard(), SoloCollectives())
    score, index = best_tokens(
        logits,
        num_valid=VALID,
        first_id=0,
        keys_S2=torch.from_numpy(row_keys(draws)).to(device),
        temperatures_S=torch.tensor([draw.sampling.temperature for draw in draws], device=device),
    )
    drawn = index.long().masked_fill(score.isnan(), NOT_FINITE)
    assert drawn.tolist() == expected.tolist()
    assert drawn[4] == NOT_FINITE
