"""What ranks over hosts are told, and who is to blame where a node has no checkpoint. Actors are fakes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from cluster.serving.rank_host import Introduction
from cluster.serving.spread_ranks import FindSource, spread
from cluster.sources import SourceError
from replicas.config import EngineLimits, ParallelConfig, RankConfig, Rendezvous

MEETING = Rendezvous(host="10.0.0.1", plan_port=5, store_port=6, plan_fd=3, store_fd=4)


@dataclass(frozen=True)
class Method:
    answer: object

    async def remote(self, *_: object) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@dataclass(frozen=True)
class FakeRank:
    """An actor whose node has the checkpoint in `folder`, or cannot have it."""

    folder: str | Exception = "not asked"

    open_rendezvous = Method(MEETING)

    @property
    def find_source(self) -> Method:
        return Method(self.folder)


def make_configs() -> list[RankConfig]:
    parallel = ParallelConfig(tensor=4, hosts=2)
    return [
        RankConfig(group="g", epoch=1, rank=rank, source="/own", parallel=parallel, limits=EngineLimits())
        for rank in range(4)
    ]


def make_met() -> list[Introduction]:
    return [
        Introduction(process=(rank, 0.0), gpu="", log_path="", node=f"n{rank // 2}", address=f"10.0.0.{rank}")
        for rank in range(4)
    ]


def find_nothing() -> Path:
    raise AssertionError("found where it is read, not here")


async def told(far: FakeRank, find: FindSource | None = find_nothing) -> list[RankConfig]:
    actors = [FakeRank(), FakeRank(), far, FakeRank()]
    return await spread(actors, make_configs(), make_met(), find)


async def test_each_host_has_a_folder_of_its_own_and_rank_0_alone_the_listeners() -> None:
    configs = await told(FakeRank("/theirs"))
    assert [config.source for config in configs] == ["/own", "/own", "/theirs", "/theirs"]
    assert [config.rendezvous for config in configs] == [MEETING, *[MEETING.told_to(1)] * 3]


async def test_without_a_model_nothing_is_looked_for() -> None:
    assert [config.source for config in await told(FakeRank(AssertionError()), None)] == ["/own"] * 4


async def test_a_node_without_the_checkpoint_is_named() -> None:
    missing = RayTaskError("find_source", "traceback", SourceError("source '/m' is no folder"))
    with pytest.raises(SourceError, match=r"on node 10\.0\.0\.2: source '/m' is no folder"):
        await told(FakeRank(missing))
