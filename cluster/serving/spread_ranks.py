"""What the ranks of a group over hosts are told besides their configuration: where they meet, and where the
checkpoint is on their own node. Asked of the actors before they run; called by `ray_ranks.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError

from cluster.serving.rank_host import Introduction
from cluster.sources import SourceError
from replicas.config import RankConfig

FindSource = Callable[[], Path]
"""The folder of the checkpoint on the node where it is called; sent to every node but the first."""


async def spread(
    actors: Sequence[Any],
    configs: Sequence[RankConfig],
    met: Sequence[Introduction],
    find_source: FindSource | None,
) -> list[RankConfig]:
    """The configurations, completed. No folder is assumed to be shared between nodes.

    Each node fetches what it lacks, all at once; raises SourceError naming the node that cannot. Without
    `find_source` there is no checkpoint.
    """
    rendezvous = await actors[0].open_rendezvous.remote()
    ranks_per_host = configs[0].parallel.ranks_per_host
    firsts = range(ranks_per_host, len(configs), ranks_per_host)
    sources = [configs[0].source] * (1 + len(firsts))
    if find_source is not None:
        sources[1:] = await asyncio.gather(*(_find(actors[rank], met[rank], find_source) for rank in firsts))
    return [
        replace(
            config,
            rendezvous=rendezvous.told_to(config.rank),
            source=sources[config.rank // ranks_per_host],
        )
        for config in configs
    ]


async def _find(actor: Any, met: Introduction, find_source: FindSource) -> str:
    try:
        return str(await actor.find_source.remote(find_source))
    except RayTaskError as error:
        if not isinstance(error.cause, SourceError):
            raise
        raise SourceError(f"on node {met.address}: {error.cause}") from error
