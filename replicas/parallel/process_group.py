"""Collectives over `torch.distributed`: NCCL between GPUs, gloo between CPU ranks of several hosts.

Ranks meet at a TCP store of rank 0: at a given address for groups over hosts, else at a port that rank 0
picks and leaves in a file, which is gone once all ranks read it. Keys carry the epoch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from replicas.errors import RankLost

_POLL_S = 0.01
_CONNECT_TIMEOUT_S = 2.0
# The older name warns from torch 2.13 on, the newer is missing before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ProcessGroupCollectives:
    """One rank's end of the process's default group. One per process."""

    def __init__(self, store: Store, *, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._timeout_s = timeout_s
        self._barriers = 0
        is_cuda = device.type == "cuda"
        try:
            dist.init_process_group(
                "nccl" if is_cuda else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
                device_id=device if is_cuda else None,
            )
        except RuntimeError as error:
            raise RankLost(f"rank {rank} could not join the group: {error}") from error

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        try:
            dist.all_reduce(x)
        except RuntimeError as error:
            raise RankLost(f"all_reduce on rank {self.rank}: {error}") from error
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty((self.size, *x.shape))
        try:
            _all_gather(gathered.view(-1), x.reshape(-1))
        except RuntimeError as error:
            raise RankLost(f"all_gather on rank {self.rank}: {error}") from error
        return gathered

    def all_gather_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Through equal parts: rows are padded to the longest, and what was padded is left out again."""
        most = max(counts)
        gathered = self.all_gather(_padded(x, most))
        if min(counts) == most:
            return gathered.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    def reduce_scatter_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        most = max(counts)
        if min(counts) < most:
            x = torch.cat([_padded(part, most) for part in x.split_with_sizes(list(counts))])
        own = x.new_empty((most, *x.shape[1:]))
        try:
            _reduce_scatter(own.view(-1), x.view(-1))
        except RuntimeError as error:
            raise RankLost(f"reduce_scatter on rank {self.rank}: {error}") from error
        return own[: counts[self.rank]]

    def barrier(self, timeout_s: float | None = None) -> None:
        """Goes through the store, so that it may last longer than a collective."""
        self._barriers += 1
        _meet(
            self._store,
            f"barrier/{self._barriers}",
            self.size,
            self._timeout_s if timeout_s is None else timeout_s,
        )

    def abort(self) -> None:
        """Break the connections: waiting peers fail at once. The group cannot be used afterwards."""
        group = dist.group.WORLD
        if group is not None:
            group.abort()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def open_store(path: Path, *, rendezvous: str, rank: int, size: int, epoch: int, timeout_s: float) -> Store:
    """The store of the group, when all ranks have it; RankLost after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    try:
        if rendezvous:
            host, _, port = rendezvous.rpartition(":")
            tcp = _tcp_store(host, int(port), is_master=rank == 0, timeout_s=timeout_s)
        elif rank == 0:
            tcp = _tcp_store("127.0.0.1", 0, is_master=True, timeout_s=timeout_s)
            private = path.with_name(f"{path.name}.{rank}")
            private.write_text(str(tcp.port), encoding="ascii")
            private.rename(path)
        else:
            tcp = _connect_by_file(path, deadline_s)
            tcp.set_timeout(timedelta(seconds=timeout_s))
        store = PrefixStore(f"epoch/{epoch}", tcp)
        _meet(store, "attached", size, max(_POLL_S, deadline_s - time.monotonic()))
    except (RuntimeError, OSError) as error:
        raise RankLost(f"rank {rank} found no store for its group: {error}") from error
    finally:
        if rank == 0 and not rendezvous:
            path.unlink(missing_ok=True)
    return store


def _padded(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`x` with rows of zeros up to `num_rows`; itself if it has as many."""
    missing = num_rows - len(x)
    return torch.cat((x, x.new_zeros((missing, *x.shape[1:])))) if missing else x


def _tcp_store(host: str, port: int, *, is_master: bool, timeout_s: float) -> TCPStore:
    return TCPStore(
        host, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


def _connect_by_file(path: Path, deadline_s: float) -> TCPStore:
    """A port left by a dead group refuses; rank 0 replaces the file."""
    while True:
        try:
            port = int(path.read_text(encoding="ascii"))
            return _tcp_store("127.0.0.1", port, is_master=False, timeout_s=_CONNECT_TIMEOUT_S)
        except (FileNotFoundError, RuntimeError, ValueError):
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_POLL_S)


def _meet(store: Store, key: str, size: int, timeout_s: float) -> None:
    """The last of `size` ranks to come lets all go."""
    try:
        if store.add(key, 1) == size:
            store.set(f"{key}/all", "1")
        store.wait([f"{key}/all"], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise RankLost(f"not all {size} ranks reached {key!r} within {timeout_s:.0f} s: {error}") from error
