"""What was learned outlives its group, for the same model, device, precision and layout only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from replicas.config import ParallelConfig, ReplicaConfig
from replicas.energy.learning import LearnedFactors
from replicas.request import EngineCosts, EngineReady, LoadSnapshot
from replicas.supervisor.learned_energy import LearnedFile

LEARNED = LearnedFactors(factors=(1.25, 0.5, 0.0), num_windows=70)
ENGINE = EngineReady(
    architecture="llama",
    lanes=1,
    context_tokens=64,
    max_sequences=4,
    vocab_size=32,
    block_tokens=16,
    weights_digest="abc",
    dtype="bfloat16",
    device="cuda:0",
    eos_token_ids=(2,),
    costs=EngineCosts(
        active_params=1,
        shared_weight_bytes=1,
        expert_bytes=0,
        num_layers=1,
        attention_dim=1,
        kv_bytes_per_token=1,
    ),
    load=LoadSnapshot(
        step=0, running=(), waiting=(), waiting_prefill_tokens=(), free_blocks=(), total_blocks=()
    ),
)


def make_config(folder: Path) -> ReplicaConfig:
    return ReplicaConfig(model="m", source="/models/m", replica_id="m/0", routers=(), runtime_dir=str(folder))


def test_another_card_of_the_same_kind_goes_on_and_another_layout_begins_anew(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    LearnedFile(config, ENGINE).write(LEARNED)
    assert LearnedFile(config, replace(ENGINE, device="cuda:1")).read() == LEARNED
    sharded = replace(config, parallel=ParallelConfig(tensor=2))
    assert LearnedFile(sharded, ENGINE).read() is None
    assert LearnedFile(config, replace(ENGINE, dtype="float32")).read() is None
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": 3}'])
def test_a_file_that_is_not_ours_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    file = LearnedFile(make_config(tmp_path), ENGINE)
    file.path.write_text(text)
    assert file.read() is None


def test_a_folder_that_is_gone_costs_the_head_start_only(tmp_path: Path) -> None:
    LearnedFile(make_config(tmp_path / "gone"), ENGINE).write(LEARNED)
    assert LearnedFile(make_config(tmp_path / "gone"), ENGINE).read() is None
