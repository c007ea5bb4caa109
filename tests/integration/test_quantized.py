"""Models with weights in bytes: kernels against torch on the rounded weights, and against the whole ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replicas.config import ParallelConfig, RankConfig
from replicas.parallel.collectives import Collectives
from replicas.rank.runner import ModelRunner
from tests.checkpoints import make_granite_moe, make_llama
from tests.demo_corpus import EXAMPLES_DIR
from tests.rank_threads import make_rank_config, run_rank_threads
from tests.scripted_rank import (
    LIMITS,
    ScriptedResult,
    ScriptedSequence,
    make_script_configs,
    make_scripts,
    run_script,
)

MAX_RELATIVE_ERROR = 1e-4
DEMO_TOP1_SHARE = 0.95
DEMO_KL_NATS = 0.02


def run(configs: list[RankConfig], scripts: list[ScriptedSequence]) -> ScriptedResult:
    results = run_rank_threads(configs, lambda config, ranks: run_script(config, ranks, scripts))
    first = results[0]
    assert isinstance(first, ScriptedResult), results
    return first


def make_configs(
    folder: Path, source: Path, *, kernels: str, quantization: str = "int8", tensor: int = 1, expert: int = 1
) -> list[RankConfig]:
    plain = make_script_configs(folder, source, tensor=tensor, expert=expert, kernels=kernels)
    return [replace(config, quantization=quantization) for config in plain]


@pytest.mark.parametrize(
    ("name", "tensor", "expert"),
    [("llama", 1, 1), ("llama", 2, 1), ("granite-moe", 1, 1), ("granite-moe", 2, 2)],
)
def test_kernels_compute_what_torch_does_with_the_rounded_weights(
    tmp_path: Path, name: str, tensor: int, expert: int
) -> None:
    torch.set_num_threads(1)
    make = make_llama if name == "llama" else make_granite_moe
    source = make(tmp_path / name, seed=1)
    scripts = make_scripts(seed=0, vocab_size=500)
    ours, theirs = (
        run(make_configs(tmp_path, source, kernels=kernels, tensor=tensor, expert=expert), scripts)
        for kernels in ("auto", "off")
    )
    assert ours.token_ids == theirs.token_ids
    for our_rows, their_rows in zip(ours.logits, theirs.logits, strict=True):
        ours_SV, theirs_SV = torch.stack(our_rows), torch.stack(their_rows)
        assert (ours_SV - theirs_SV).abs().max() <= MAX_RELATIVE_ERROR * theirs_SV.abs().max()


@pytest.mark.parametrize("model", ["llama-demo", "granite-moe-demo"])
def test_a_demonstration_model_says_nearly_the_same(tmp_path: Path, model: str) -> None:
    """Next-token distributions behind 60 random beginnings: best token and divergence."""
    torch.set_num_threads(1)
    source = EXAMPLES_DIR / "models" / model
    scripts = [
        replace(script, num_tokens=1)
        for seed in range(12)
        for script in make_scripts(seed=seed, vocab_size=500)
    ]
    whole, byte = (
        torch.cat([torch.stack(rows) for rows in run(configs, scripts).logits])
        for configs in (
            make_configs(tmp_path, source, kernels="auto", quantization=quantization)
            for quantization in ("none", "int8")
        )
    )
    agreed = (whole.argmax(dim=1) == byte.argmax(dim=1)).float().mean()
    log_p, log_q = whole.log_softmax(dim=1), byte.log_softmax(dim=1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    assert agreed >= DEMO_TOP1_SHARE
    assert divergence.mean() <= DEMO_KL_NATS


def test_rounded_weights_are_other_weights_of_fewer_bytes(tmp_path: Path) -> None:
    """A stream goes on at a replica of the same rounding alone; energy is shared by the bytes really read."""
    source = make_llama(tmp_path / "llama")

    def build(quantization: str) -> ModelRunner:
        config = replace(
            make_rank_config(tmp_path, rank=0, parallel=ParallelConfig(), source=str(source), limits=LIMITS),
            quantization=quantization,
        )

        def work(config: RankConfig, ranks: Collectives) -> ModelRunner:
            return ModelRunner.build(config, ranks, lambda stage, done, total: None)

        (runner,) = run_rank_threads([config], work)
        assert isinstance(runner, ModelRunner), runner
        return runner

    whole, byte, again = build("none"), build("int8"), build("int8")
    assert byte.weights_digest == again.weights_digest != whole.weights_digest
    assert (whole.quantization, byte.quantization) == ("none", "int8")
    if byte.kernels != "torch":
        assert byte.kernels.endswith("-int8")
        assert byte.costs.shared_weight_bytes < 0.3 * whole.costs.shared_weight_bytes
    assert byte.costs.kv_bytes_per_token == whole.costs.kv_bytes_per_token
