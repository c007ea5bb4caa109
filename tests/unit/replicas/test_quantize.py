"""Weights in bytes: how far off they are, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from replicas.config import ParallelConfig, RankConfig
from replicas.layers.quantize import quantize, round_weights, rounded
from replicas.models.checkpoint import Checkpoint
from replicas.models.config_file import read_spec
from replicas.models.weights import ExpertWeights, load_weights
from replicas.parallel.degrees import shard_of
from tests.checkpoints import make_granite_moe
from tests.rank_threads import make_rank_config


def test_an_entry_is_off_by_at_most_half_the_scale_of_its_row() -> None:
    weight = (
        torch.randn(40, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 40)[:, None]
    )
    matrix = quantize(weight)
    assert matrix.values_OI.dtype == torch.int8
    assert int(matrix.values_OI.min()) >= -127
    assert matrix.values_OI.abs().amax(dim=1).tolist() == [127] * 40
    off = (matrix.dequantized() - weight).abs()
    assert bool((off <= 0.5001 * matrix.scales_O[:, None]).all())


def test_a_row_of_zeros_stays_one_and_rounding_twice_changes_nothing() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.5, -1.27, 0.004]])
    assert rounded(weight).tolist()[0] == [0.0, 0.0, 0.0]
    torch.testing.assert_close(rounded(weight)[1], torch.tensor([0.5, -1.27, 0.0]))
    assert torch.equal(quantize(rounded(weight)).values_OI, quantize(weight).values_OI)


def test_embedding_norms_and_router_keep_their_bits(tmp_path: Path) -> None:
    source = make_granite_moe(tmp_path / "moe", vocab_size=515)
    spec = read_spec(source)
    with Checkpoint(source) as checkpoint:
        weights = load_weights(
            checkpoint,
            spec,
            shard_of(spec, ParallelConfig(), 0),
            device=torch.device("cpu"),
            dtype=torch.float32,
            progress=lambda stage, done, total: None,
        )
    assert weights.head_VH is weights.embedding_VH
    byte = round_weights(weights)
    assert byte.embedding_VH is weights.embedding_VH
    assert torch.equal(byte.head_VH, rounded(weights.head_VH))
    for ours, theirs in zip(byte.layers, weights.layers, strict=True):
        assert isinstance(ours.ffn, ExpertWeights)
        assert isinstance(theirs.ffn, ExpertWeights)
        assert ours.ffn.router_XH is theirs.ffn.router_XH
        assert ours.attention_norm_H is theirs.attention_norm_H
        assert torch.equal(ours.ffn.down_EHF[3], rounded(theirs.ffn.down_EHF[3]))
        assert not torch.equal(ours.qkv_QH, theirs.qkv_QH)


@pytest.mark.parametrize(
    ("device", "quantization", "said"), [("cuda", "int8", "CPUs alone"), ("cpu", "int4", "int4")]
)
def test_what_is_not_served_is_refused(tmp_path: Path, device: str, quantization: str, said: str) -> None:
    fine = make_rank_config(tmp_path, rank=0, parallel=ParallelConfig())
    with pytest.raises(ValueError, match=said):
        RankConfig(
            group=fine.group,
            epoch=1,
            rank=0,
            source="null",
            parallel=fine.parallel,
            limits=fine.limits,
            device=device,
            quantization=quantization,
        )
