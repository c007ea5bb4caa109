"""The processes of ranks under Ray, as far as it goes without a Ray."""

from __future__ import annotations

import asyncio

import pytest

from cluster.serving.rank_host import Introduction
from cluster.serving.ray_ranks import meet
from replicas.errors import RankLost


class Stillborn:
    """An actor whose process never runs; it is its own method."""

    @property
    def introduce(self) -> Stillborn:
        return self

    def remote(self) -> asyncio.Future[Introduction]:
        return asyncio.get_running_loop().create_future()


async def test_processes_that_do_not_start_are_a_lost_group_with_a_reason() -> None:
    with pytest.raises(RankLost, match=r"did not start the processes of 2 ranks within 0\.01 s"):
        await meet([Stillborn(), Stillborn()], timeout_s=0.01)
