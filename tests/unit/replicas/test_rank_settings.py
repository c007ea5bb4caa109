"""What a supervisor tells its ranks, and that settings no rank can have leave nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from replicas.config import EngineLimits, ParallelConfig, RankConfig, ReplicaConfig
from replicas.errors import BadKernels, RankLost
from replicas.supervisor.rank_group import RankProcess
from replicas.supervisor.supervisor import Supervisor


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
        source="/models/m",
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


async def test_an_attention_for_gpus_ends_the_start_on_a_cpu(tmp_path: Path) -> None:
    ranks = StillbornRanks()
    config = replace(make_config(tmp_path), device="cpu")
    with pytest.raises(BadKernels, match="attention is 'varlen', but device is 'cpu'; it needs cuda"):
        await Supervisor(config, ranks, lambda reason: None, epoch=7).start()
    assert not ranks.told
    assert not list(tmp_path.glob("*/*"))
