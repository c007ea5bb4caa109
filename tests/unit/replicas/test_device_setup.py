"""What a CUDA rank refuses before it loads weights, and what it does not even look at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replicas.config import EngineLimits, ParallelConfig
from replicas.errors import BadKernels
from replicas.layers.triton import varlen
from replicas.layers.triton.varlen import varlen_facts
from replicas.models.config_file import read_spec
from replicas.rank import device_setup
from replicas.rank.device_setup import cuda_support
from tests.checkpoints import make_llama
from tests.rank_threads import make_rank_config

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("attention", "has_triton", "reason"),
    [
        ("varlen", True, "the device has capability 7.5; at least 8.0"),
        ("varlen", False, "Triton is missing"),
        ("triton", False, "Triton is missing"),
    ],
)
def test_an_attention_that_cannot_be_is_refused_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str, has_triton: bool, reason: str
) -> None:
    config = make_rank_config(
        tmp_path, rank=0, parallel=ParallelConfig(), limits=EngineLimits(block_tokens=256, cuda_graphs=False)
    )
    config = replace(config, device="cuda", attention=attention)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(device_setup, "load_device_kernels", lambda: object() if has_triton else None)
    with pytest.raises(BadKernels, match=f"attention is '{attention}', but {reason}"):
        cuda_support(config, read_spec(make_llama(tmp_path)), CUDA)


def test_torchs_function_is_not_imported_where_something_else_speaks_against_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at: list[str] = []

    def look() -> str:
        looked_at.append("torch's function")
        return "it takes no block_table"

    monkeypatch.setattr(varlen, "_lacks", look)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert varlen_facts(torch.bfloat16, CUDA, block_tokens=16, head_dim=64).lacks == ""
    assert varlen_facts(torch.float32, CUDA, block_tokens=256, head_dim=64).lacks == ""
    assert not looked_at
    assert (
        varlen_facts(torch.bfloat16, CUDA, block_tokens=256, head_dim=64).lacks == "it takes no block_table"
    )
