"""What a supervisor tells its ranks, and that settings no rank can have leave nothing behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from replicas.config import EngineLimits, ParallelConfig, RankConfig, ReplicaConfig
from replicas.errors import BadCheckpoint, BadKernels, BadParallelism, RankLost, ReplicaError
from replicas.supervisor.rank_group import RankProcess
from replicas.supervisor.supervisor import Supervisor
from tests.demo_corpus import EXAMPLES_DIR

DEMO_CONFIG = EXAMPLES_DIR / "models" / "llama-demo" / "config.json"


@dataclass(slots=True)
class StillbornRanks:
    """A group that cannot start; keeps what it was told."""

    told: list[RankConfig] = field(default_factory=list)

    async def start(self, configs: Sequence[RankConfig]) -> tuple[RankProcess, ...]:
        self.told += configs
        raise RankLost("no rank starts here")

    async def wait_death(self) -> str:
        return "never born"

    async def kill(self) -> None:
        pass


def make_config(folder: Path) -> ReplicaConfig:
    for name in ("run", "shm"):
        (folder / name).mkdir()
    return ReplicaConfig(
        model="m",
        source="null",
        replica_id="m#1",
        routers=(),
        parallel=ParallelConfig(tensor=2),
        limits=EngineLimits(block_tokens=256),
        device="cuda",
        dtype="bfloat16",
        attention="varlen",
        runtime_dir=str(folder / "run"),
        shared_dir=str(folder / "shm"),
    )


async def test_every_rank_is_told_the_attention_asked_for(tmp_path: Path) -> None:
    ranks = StillbornRanks()
    with pytest.raises(RankLost, match="no rank starts here"):
        await Supervisor(make_config(tmp_path), ranks, lambda reason: None, epoch=7).start()
    assert [(told.rank, told.attention, told.dtype) for told in ranks.told] == [
        (0, "varlen", "bfloat16"),
        (1, "varlen", "bfloat16"),
    ]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"architectures": ["MistralForCausalLM"]}, BadCheckpoint, "served: LlamaForCausalLM"),
        ({"intermediate_size": 383}, BadParallelism, "ffn_size=383 % tensor=2 = 1"),
    ],
)
async def test_a_model_that_cannot_be_served_is_refused_before_a_rank_starts(
    tmp_path: Path, change: dict[str, object], error: type[ReplicaError], said: str
) -> None:
    ranks = StillbornRanks()
    config = replace(make_config(tmp_path), source=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(DEMO_CONFIG.read_text()), **change}))
    with pytest.raises(error, match=said):
        await Supervisor(config, ranks, lambda reason: None, epoch=7).start()
    assert not ranks.told


async def test_an_attention_for_gpus_ends_the_start_on_a_cpu(tmp_path: Path) -> None:
    ranks = StillbornRanks()
    config = replace(make_config(tmp_path), device="cpu")
    with pytest.raises(BadKernels, match="attention is 'varlen', but device is 'cpu'; it needs cuda"):
        await Supervisor(config, ranks, lambda reason: None, epoch=7).start()
    assert not ranks.told
    assert not list(tmp_path.glob("*/*"))
