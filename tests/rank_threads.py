"""A group of ranks as threads of one process: the same collectives, without the start of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.models.spec import ModelSpec
from replicas.parallel.collectives import Collectives, make_collectives


def make_rank_config(
    folder: Path,
    *,
    rank: int,
    parallel: ParallelConfig,
    source: str = "null",
    limits: EngineLimits | None = None,
    timeout_s: float = 150.0,
) -> RankConfig:
    return RankConfig(
        group="group",
        epoch=7,
        rank=rank,
        source=source,
        parallel=parallel,
        limits=limits or EngineLimits(),
        shared_dir=str(folder),
        spec=spec_of(source),
        attach_timeout_s=timeout_s,
        collective_timeout_s=timeout_s,
    )


def spec_of(source: str) -> ModelSpec | None:
    """None for the null engine, whose tests need not wait for transformers."""
    if source == "null":
        return None
    from replicas.models.config_file import read_spec

    return read_spec(Path(source))


def run_rank_threads(
    configs: list[RankConfig], work: Callable[[RankConfig, Collectives], object]
) -> list[object]:
    """`work` on every rank, one thread each; what it returned or raised, in rank order."""
    results: list[object] = [AssertionError("still running")] * len(configs)

    def rank_main(config: RankConfig) -> None:
        try:
            collectives = make_collectives(config)
            try:
                results[config.rank] = work(config, collectives)
            except BaseException:
                collectives.abort()
                raise
            finally:
                collectives.close()
        except BaseException as error:
            results[config.rank] = error

    threads = [threading.Thread(target=rank_main, args=(config,)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=150.0)
    return results
