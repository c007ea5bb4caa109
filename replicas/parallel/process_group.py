"""Collectives over `torch.distributed`: NCCL between GPUs, gloo between CPU ranks of several hosts.

Ranks meet at a TCP store of rank 0: over hosts at a port that it has open and all were told, else at one that
it picks and leaves in a file, which is gone once all ranks read it. Keys carry the epoch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from replicas.config import Rendezvous
from replicas.errors import RankLost
from replicas.parallel.one_shot import DTYPES, SmallSum, is_small

logger = logging.getLogger(__name__)

_POLL_S = 0.01
_CONNECT_TIMEOUT_S = 2.0
_CHECKED = 1024
_CHECK_ROUNDINGS = 4
"""Of the sum of a check, per rank: another order of additions rounds differently."""
# The older name warns from torch 2.13 on, the newer is missing before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ProcessGroupCollectives:
    """One rank's end of the process's default group. One per process.

    `small_sums` says what small all-reduces go through: the backend, or `one-shot`.
    """

    def __init__(self, store: Store, *, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._device = device
        self._timeout_s = timeout_s
        self._barriers = 0
        self._small_sum: SmallSum | None = None
        is_cuda = device.type == "cuda"
        self._backend = self.small_sums = "nccl" if is_cuda else "gloo"
        try:
            dist.init_process_group(
                self._backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
                device_id=device if is_cuda else None,
            )
        except RuntimeError as error:
            raise RankLost(f"rank {rank} could not join the group: {error}") from error

    @property
    def group_name(self) -> str:
        group = dist.group.WORLD
        assert group is not None, "the group was joined"
        return group.group_name

    def try_small_sum(self, open_small: Callable[[], SmallSum]) -> None:
        """Use it for small messages from now on, if it gives every rank what the group does.

        All ranks together, once, at start-up: they use it all, or none. The log says which, and why.
        """
        reason = "checked"
        try:
            small_sum: SmallSum | None = open_small()
        except (RuntimeError, AttributeError, OSError) as error:
            small_sum, reason = None, f"not available: {error}"
        if not self._do_all(small_sum is not None) or small_sum is None:
            reason = reason if small_sum is None else "another rank has none"
        elif not self._do_all(self._is_right(small_sum)):
            reason = f"it does not give what {self._backend} gives"
        else:
            self._small_sum, self.small_sums = small_sum, "one-shot"
        logger.info("small_sums rank=%d through=%s reason=%s", self.rank, self.small_sums, reason)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._small_sum is not None and is_small(x):
            return self._small_sum(x)
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

    def set_timeout(self, timeout_s: float) -> None:
        """NCCL looks after its operations from a thread of its own, which ends the process; gloo raises."""
        self._timeout_s = timeout_s
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))

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

    def _is_right(self, small_sum: SmallSum) -> bool:
        """Compare sums of what differs between ranks and is not round. No early end: all add together."""
        is_right = True
        for dtype in DTYPES:
            x = torch.linspace(-1.0, 1.0 + self.rank, _CHECKED, device=self._device).to(dtype)
            wanted = x.clone()
            dist.all_reduce(wanted)
            tolerance = _CHECK_ROUNDINGS * torch.finfo(dtype).eps * self.size
            is_right &= torch.allclose(small_sum(x), wanted, rtol=tolerance, atol=tolerance)
        return is_right

    def _do_all(self, answer: bool) -> bool:
        """Whether every rank says yes."""
        mine = torch.tensor([int(answer)], device=self._device)
        return bool(self.all_gather(mine).all())

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def open_store(
    path: Path, *, rendezvous: Rendezvous | None, rank: int, size: int, epoch: int, timeout_s: float
) -> Store:
    """The store of the group, when all ranks have it; RankLost after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    try:
        if rendezvous:
            host, port = rendezvous.host, rendezvous.store_port
            listener = rendezvous.store_fd if rank == 0 else None
            tcp = _tcp_store(host, port, is_master=rank == 0, timeout_s=timeout_s, listener=listener)
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


def _tcp_store(
    host: str, port: int, *, is_master: bool, timeout_s: float, listener: int | None = None
) -> TCPStore:
    return TCPStore(
        host,
        port,
        is_master=is_master,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener,
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
