"""How the ranks of a group add up and exchange tensors within a step.

All ranks call the same operations in the same order, with the same counts of rows. What they get is
bit-identical, so that all of them sample the same token. `make_collectives` picks the implementation a group
needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from replicas.config import RankConfig
from replicas.errors import BadParallelism
from replicas.parallel.one_shot import open_one_shot
from replicas.parallel.process_group import ProcessGroupCollectives, open_store
from replicas.parallel.rendezvous import choose_interface
from replicas.parallel.shared_memory import SharedMemoryCollectives


class Collectives(Protocol):
    """One rank's end of a group. Every operation raises RankLost when a peer is gone or too late."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum contiguous `x` over the ranks, in place; returns `x`."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of every rank, stacked in rank order: shape [size, ...]."""

    def all_gather_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The rows of all ranks in rank order, [sum(counts), ...]; `x` has the `counts[rank]` of this one."""

    def reduce_scatter_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Sum contiguous [sum(counts), ...] over the ranks; returns this rank's `counts[rank]` rows of it."""

    def barrier(self, timeout_s: float | None = None) -> None:
        """Return when every rank is here; `timeout_s` None: the group's timeout."""

    def set_timeout(self, timeout_s: float) -> None:
        """How long a peer may keep this rank waiting from now on: patient while ranks load and compile."""

    def abort(self) -> None:
        """Make every rank's current and next operation raise RankLost."""

    def close(self) -> None:
        """Release memory, descriptors and connections."""


class SoloCollectives:
    """A group of one: nothing to add, nobody to wait for."""

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(0)

    def all_gather_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return x

    def reduce_scatter_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return x

    def barrier(self, timeout_s: float | None = None) -> None:
        pass

    def set_timeout(self, timeout_s: float) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def make_collectives(config: RankConfig) -> Collectives:
    """Attach to the group; blocks until all ranks are here, at most `attach_timeout_s`, else RankLost.

    Operations are as patient until `set_timeout`, which a rank calls when it is warm.
    """
    if config.num_ranks == 1:
        return SoloCollectives()
    path = Path(config.shared_dir) / f"{config.group}.{config.epoch}.collectives"
    if config.device == "cpu" and not config.rendezvous:
        return SharedMemoryCollectives(
            path,
            rank=config.rank,
            size=config.num_ranks,
            epoch=config.epoch,
            timeout_s=config.attach_timeout_s,
            attach_timeout_s=config.attach_timeout_s,
        )
    store = open_store(
        path,
        rendezvous=config.rendezvous,
        rank=config.rank,
        size=config.num_ranks,
        epoch=config.epoch,
        timeout_s=config.attach_timeout_s,
    )
    device = device_of(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif config.rendezvous:
        choose_interface(config.rendezvous)
    collectives = ProcessGroupCollectives(
        store,
        rank=config.rank,
        size=config.num_ranks,
        device=device,
        timeout_s=config.attach_timeout_s,
    )
    if device.type == "cuda" and not config.rendezvous:
        collectives.try_small_sum(lambda: open_one_shot(collectives.group_name, device))
    return collectives


def device_of(config: RankConfig) -> torch.device:
    """Every rank of a group sees all GPUs of the group on its host, in rank order."""
    device = torch.device(config.device)
    if device.type != "cuda" or device.index is not None:
        return device
    num_devices = torch.cuda.device_count()
    if config.local_rank >= num_devices:
        raise BadParallelism(
            f"rank {config.rank} of {config.num_ranks} needs a GPU of its own; {num_devices} are visible; "
            "lower parallel.tensor and parallel.expert, or check CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", config.local_rank)
