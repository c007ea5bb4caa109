"""Ranks as real processes. A child imports the module of what it runs: this one loads no transformers."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.queues import Queue
from pathlib import Path

import torch
import torch.distributed as dist

from replicas.config import RankConfig
from replicas.errors import RankLost
from replicas.parallel.collectives import make_collectives
from replicas.parallel.one_shot import SmallSum
from replicas.parallel.process_group import ProcessGroupCollectives, open_store

Report = tuple[int, str, object]
"""(rank, what, value) from a child."""


def spawn_ranks(target: object, arguments: list[tuple[object, ...]]) -> tuple[list[int], list[Report]]:
    """Run `target(queue, *arguments[rank])` once per rank; exit codes and reports when all have ended."""
    context = multiprocessing.get_context("spawn")
    queue: Queue[Report] = context.Queue()
    children = [
        context.Process(target=target, args=(queue, *own), daemon=True)  # type: ignore[arg-type]
        for own in arguments
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=150.0)
        if child.is_alive():
            child.kill()
    reports = []
    while not queue.empty():
        reports.append(queue.get())
    return [child.exitcode if child.exitcode is not None else -1 for child in children], reports


def lose_a_peer(queue: Queue[Report], config: RankConfig, folder: Path) -> None:
    """Add up over shared memory and over gloo; then rank 1 kills itself and rank 0 must notice."""
    store = open_store(
        folder / "store", rendezvous=None, rank=config.rank, size=2, epoch=config.epoch, timeout_s=150.0
    )
    gloo = ProcessGroupCollectives(
        store, rank=config.rank, size=2, device=torch.device("cpu"), timeout_s=150.0
    )
    mine = torch.arange(6.0).view(2, 3) * (config.rank + 1)
    gloo.barrier()
    queue.put((config.rank, "gathered", gloo.all_gather(mine).tolist()))
    queue.put((config.rank, "summed", gloo.all_reduce(mine).tolist()))
    uneven = mine[: config.rank + 1]
    queue.put((config.rank, "rows", gloo.all_gather_rows(uneven, (1, 2)).tolist()))
    queue.put((config.rank, "row sums", gloo.reduce_scatter_rows(torch.ones(3, 2), (1, 2)).tolist()))
    shared = make_collectives(config)
    queue.put((config.rank, "shared", shared.all_reduce(torch.ones(3) * config.rank).tolist()))
    if config.rank == 1:
        queue.close()
        queue.join_thread()
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        shared.all_reduce(torch.ones(3))
    except RankLost as error:
        queue.put((0, "shared-lost", str(error)))
    try:
        gloo.all_reduce(torch.ones(3))
    except RankLost as error:
        queue.put((0, "gloo-lost", type(error.__cause__).__name__))
    gloo.close()


def choose_small_sums(queue: Queue[Report], rank: int, folder: Path) -> None:
    """Offer a group a way to add up that rank 1 lacks, a wrong one and a right one; then rank 1 is late."""
    store = open_store(folder / "store", rendezvous=None, rank=rank, size=2, epoch=3, timeout_s=150.0)
    gloo = ProcessGroupCollectives(store, rank=rank, size=2, device=torch.device("cpu"), timeout_s=150.0)
    served: list[tuple[int, ...]] = []

    def add_right(x: torch.Tensor) -> torch.Tensor:
        served.append(tuple(x.shape))
        return x.copy_(gloo.all_gather(x).sum(0))

    def add_wrong(x: torch.Tensor) -> torch.Tensor:
        return add_right(x).add_(0.25 if rank == 1 else 0.0)

    def open_right() -> SmallSum:
        return add_right

    def open_wrong() -> SmallSum:
        return add_wrong

    def open_alone() -> SmallSum:
        if rank == 1:
            raise RuntimeError("no peer access")
        return add_wrong

    for name, open_small in (("alone", open_alone), ("wrong", open_wrong), ("right", open_right)):
        gloo.try_small_sum(open_small)
        queue.put((rank, name, gloo.small_sums))
    served.clear()
    sums = [gloo.all_reduce(torch.full(shape, 1.0 + rank)) for shape in ((8,), (3,), (70_000,))]
    queue.put((rank, "sums", [float(x.max()) for x in sums]))
    queue.put((rank, "served", served))
    gloo.set_timeout(0.3)
    if rank == 0:
        try:
            gloo.barrier()
        except RankLost:
            queue.put((rank, "late", "barrier"))
        try:
            dist.all_reduce(torch.ones(2))
        except RuntimeError:
            queue.put((rank, "late", "sum"))
        gloo.abort()
    gloo.close()
