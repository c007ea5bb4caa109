"""Ranks as Ray actors: one per bundle of the replica's placement group. No Ray call after start-up.

`RayRankGroup` is the `RankGroup` of a replica under Ray Serve. A rank's endless `run` call is its death
sentinel: the call fails when the process does. Ranks are never restarted alone; if the supervisor dies, Ray
ends them with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayTaskError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.serving.gpu_names import gpu_uuid
from cluster.serving.placement import Placement
from replicas.config import RankConfig, rank_config_from_json, rank_config_to_json
from replicas.errors import RankLost
from replicas.rank.main import run_rank
from replicas.supervisor.rank_group import THREAD_VARIABLES, RankProcess

START_TIMEOUT_S = 120.0
"""How long Ray may take to start processes whose bundles are already reserved."""
GONE_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """What the process of a rank says of itself before it is told anything. `gpu` is empty on CPU."""

    pid: int
    gpu: str
    log_path: str


class RankHost:
    """The actor: a process in its bundle, with its device."""

    def introduce(self) -> Introduction:
        gpu_ids = ray.get_gpu_ids()
        return Introduction(
            pid=os.getpid(),
            gpu=gpu_uuid(str(gpu_ids[0])) if gpu_ids else "",
            log_path=str(Path("/proc/self/fd/2").readlink()),
        )

    def run(self, config_json: str, group_gpus: tuple[str, ...]) -> None:
        """Be the rank until the group ends. Every rank sees all GPUs of its group, in rank order."""
        config = rank_config_from_json(config_json)
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(config.threads)))
        if group_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(group_gpus)
        run_rank(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRank:
    rank: int
    actor: Any
    process: psutil.Process
    log_path: str
    end: asyncio.Task[None]
    """Ends, or fails, when the process does."""


class RayRankGroup:
    """The ranks of one replica, on its own node, in its own placement group."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
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
        group_gpus = tuple(one.gpu for one in met if one.gpu)
        for config, actor, one in zip(configs, self._actors, met, strict=True):
            end = asyncio.ensure_future(_until_end(actor.run.remote(rank_config_to_json(config), group_gpus)))
            self._ranks.append(
                RunningRank(
                    rank=config.rank,
                    actor=actor,
                    process=psutil.Process(one.pid),
                    log_path=one.log_path,
                    end=end,
                )
            )
        return tuple(
            RankProcess(rank=config.rank, pid=one.pid, device=one.gpu or config.device)
            for config, one in zip(configs, met, strict=True)
        )

    def _create(self, rank: int) -> Any:
        placement = self._placement
        strategy = PlacementGroupSchedulingStrategy(
            get_current_placement_group(), placement_group_bundle_index=rank
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
        processes = [process for rank in self._ranks for process in _family(rank.process)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        await asyncio.wait(
            [rank.end for rank in self._ranks], timeout=GONE_TIMEOUT_S
        ) if self._ranks else None
        _, alive = await asyncio.to_thread(psutil.wait_procs, processes, GONE_TIMEOUT_S)
        for process in alive:
            logger.error("rank_not_gone pid=%d after_s=%g", process.pid, GONE_TIMEOUT_S)


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


async def _until_end(reference: Any) -> None:
    """A coroutine around an ObjectRef, which asyncio cannot wait for itself."""
    await reference


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _death_reason(rank: RunningRank) -> str:
    error = None if rank.end.cancelled() else rank.end.exception()
    if error is None:
        how = "left by itself"
    elif isinstance(error, RayTaskError):
        how = f"failed: {type(error.cause).__name__}: {error.cause}"
    else:
        how = "was killed or crashed"
    return f"rank {rank.rank} (pid {rank.process.pid}) {how}; log: {rank.log_path}"
