"""Ranks as Ray actors in the bundles of the replica's placement group. No Ray call after start-up.

`RayRankGroup` is the `RankGroup` of a replica under Ray Serve. A rank's endless `run` call is its death
sentinel: the call fails when the process does, or its node. Ranks are never restarted alone; if the
supervisor dies, Ray ends them with it. A process of another node is never looked up here by its number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.serving.placement import Placement
from cluster.serving.process_families import end_families
from cluster.serving.rank_host import Introduction, RankHost
from cluster.serving.spread_ranks import FindSource, spread
from replicas.config import RankConfig, rank_config_to_json
from replicas.errors import RankLost
from replicas.supervisor.rank_group import RankProcess

START_TIMEOUT_S = 120.0
"""How long Ray may take to start processes whose bundles are already reserved."""
GONE_TIMEOUT_S = 10.0
FAREWELL_S = 1.0
"""How long a rank of another node may take to notice that its group has ended, before it is ended there."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRank:
    rank: int
    met: Introduction
    is_near: bool
    """On the node of the supervisor."""
    end: asyncio.Task[None]
    """Ends, or fails, when the process does."""

    @property
    def label(self) -> str:
        return f"rank {self.rank} (pid {self.met.pid}{'' if self.is_near else f' on {self.met.address}'})"


class RayRankGroup:
    """The ranks of one replica, in its own placement group. Rank 0 is on the node of this process.

    `find_source` is needed over hosts, unless there is no model. `on_placed` is called when every rank has a
    process, before any of them loads.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        find_source: FindSource | None = None,
        on_placed: Callable[[Sequence[RankProcess]], None] | None = None,
    ) -> None:
        self._placement = placement
        self._find_source = find_source
        self._on_placed = on_placed
        self._actors: list[Any] = []
        self._ranks: list[RunningRank] = []

    async def start(self, configs: Sequence[RankConfig]) -> tuple[RankProcess, ...]:
        assert not self._actors, "a rank group starts once"
        try:
            return await self._start(configs)
        except BaseException:
            await self.kill()
            raise

    async def _start(self, configs: Sequence[RankConfig]) -> tuple[RankProcess, ...]:
        self._actors = [self._create(config.rank) for config in configs]
        met = await meet(self._actors, timeout_s=START_TIMEOUT_S)
        here = met[0].node
        processes = tuple(
            RankProcess(
                rank=config.rank,
                pid=one.pid,
                device=one.gpu or config.device,
                node="" if one.node == here else one.node,
                address="" if one.node == here else one.address,
            )
            for config, one in zip(configs, met, strict=True)
        )
        if self._on_placed:
            self._on_placed(processes)
        if self._placement.num_hosts > 1:
            configs = await spread(self._actors, configs, met, self._find_source)
        for config, actor, one in zip(configs, self._actors, met, strict=True):
            host_gpus = tuple(other.gpu for other in met if other.gpu and other.node == one.node)
            end = asyncio.ensure_future(_until_end(actor.run.remote(rank_config_to_json(config), host_gpus)))
            self._ranks.append(RunningRank(rank=config.rank, met=one, is_near=one.node == here, end=end))
        return processes

    def _create(self, rank: int) -> Any:
        placement = self._placement
        strategy = PlacementGroupSchedulingStrategy(
            get_current_placement_group(), placement_group_bundle_index=placement.bundle_of(rank)
        )
        return (
            ray.remote(RankHost)
            .options(
                num_cpus=placement.cpus_per_rank,
                num_gpus=placement.gpus_per_rank,
                scheduling_strategy=strategy,
                max_restarts=0,
                max_task_retries=0,
            )
            .remote()
        )

    async def wait_death(self) -> str:
        assert self._ranks, "start the group before waiting for its end"
        ends = {rank.end: rank for rank in self._ranks}
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        return "; ".join(sorted(_death_reason(ends[end]) for end in done))

    async def kill(self) -> None:
        """All of them, with all their children; return when they are gone, or it is said which may not be.

        Ranks of other nodes end by themselves when rank 0 does. Those that do not are ended there.
        """
        far = [rank for rank in self._ranks if not rank.is_near]
        await self._end_near()
        if far:
            await asyncio.wait([rank.end for rank in far], timeout=FAREWELL_S)
        # Before Ray is told: it calls an actor dead at once then, and lets a stopped process live for 5 s.
        hung = [rank for rank in far if not _has_ended(rank.end)]
        # It waits for Ray's control plane, and Goodbye goes out meanwhile.
        await asyncio.to_thread(_end_actors, self._actors)
        nodes = {rank.met.node for rank in hung}
        await asyncio.gather(*(_end_there(node, [r for r in hung if r.met.node == node]) for node in nodes))
        if self._ranks:
            await asyncio.wait([rank.end for rank in self._ranks], timeout=GONE_TIMEOUT_S)

    async def _end_near(self) -> None:
        heads = [rank.met.process for rank in self._ranks if rank.is_near]
        for pid in await asyncio.to_thread(end_families, heads, GONE_TIMEOUT_S):
            logger.error("rank_not_gone pid=%d after_s=%g", pid, GONE_TIMEOUT_S)


async def meet(actors: Sequence[Any], *, timeout_s: float) -> list[Introduction]:
    """What each of the processes says of itself. Raises RankLost where they do not run in time."""
    try:
        async with asyncio.timeout(timeout_s):
            met: list[Introduction] = await asyncio.gather(*(actor.introduce.remote() for actor in actors))
            return met
    except TimeoutError as error:
        raise RankLost(
            f"Ray did not start the processes of {len(actors)} ranks within {timeout_s:g} s, though their "
            "bundles are reserved; its logs of workers and raylet say more"
        ) from error


def _end_actors(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor, no_restart=True)


async def _until_end(reference: Any) -> Any:
    """A coroutine around an ObjectRef, which asyncio cannot wait for itself."""
    return await reference


async def _end_there(node: str, ranks: Sequence[RunningRank]) -> None:
    """Kill them by a process of their node, which sees that they are gone; say what is not known."""
    end_them = ray.remote(end_families).options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
    )
    try:
        async with asyncio.timeout(GONE_TIMEOUT_S):
            heads = [rank.met.process for rank in ranks]
            # In a thread: without its GCS, Ray would hold up the loop that says Goodbye.
            task = await asyncio.to_thread(end_them.remote, heads, GONE_TIMEOUT_S / 2)
            alive = await _until_end(task)
        reason = f"{len(alive)} processes live on: {alive}"
    except (TimeoutError, RayError) as error:
        alive, reason = [rank.met.pid for rank in ranks], f"its node does not answer ({type(error).__name__})"
    for rank in ranks if alive else ():
        logger.error("rank_perhaps_not_gone %s reason=%s", rank.label, reason)


def _has_ended(end: asyncio.Task[None]) -> bool:
    """Whether the process is gone, or idle and in Ray's hands: an unreachable one may be neither."""
    if not end.done() or end.cancelled():
        return False
    error = end.exception()
    return error is None or isinstance(error, RayTaskError | ActorDiedError)


def _death_reason(rank: RunningRank) -> str:
    error = None if rank.end.cancelled() else rank.end.exception()
    if error is None:
        how = "left by itself"
    elif isinstance(error, RayTaskError):
        how = f"failed: {type(error.cause).__name__}: {error.cause}"
    elif isinstance(error, ActorDiedError):
        how = "was killed or crashed"
    else:
        how = f"cannot be reached: its node or the network to it is lost ({type(error).__name__})"
    return f"{rank.label} {how}; log: {rank.met.log_path}"
