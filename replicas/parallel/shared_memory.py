"""Sums and gathers between ranks of one host, through one file in the shared-memory file system.

Every rank owns two slabs in the file and a counter on its own cache lines. One operation is: copy into the
own slab, count up, wait for the counters of the others, read all slabs in rank order. All ranks therefore
compute bit-identical sums. Two slabs are enough: a rank that starts operation n+2 has seen all others start
n+1, which they do after they read the slabs of n. 8 KiB over two processes: 12 us, where gloo needs 340.

Ranks may be processes or threads. They wait here within a step only; between steps they sleep on the plan
ring.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import select
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from replicas.errors import RankLost
from replicas.parallel.futex import fence, futex_wait, futex_wake

SLAB_BYTES = 2**20
"""A larger tensor goes through in pieces of this size."""
_MAGIC = 0x57_4154_544C_494E_45
_LINE_WORDS = 16
"""128 bytes: two cache lines, for processors that fetch lines in pairs."""
_MAGIC_WORD, _SIZE_WORD, _GO_WORD, _ABORT_WORD = 0, 1, 2, 3
_COUNT, _PID, _SLEEPING = 0, 1, 2
_SPIN_COUNT = 200
_YIELD_COUNT = 50
_SLEEP_S = 0.005
"""How long a waiting rank sleeps before it looks for an abort and for dead peers."""
_ATTACH_POLL_S = 0.001
_HALF_DTYPES = (torch.bfloat16, torch.float16)


class SharedMemoryCollectives:
    """One rank's end. Owns its mapping; the file's name is gone once all ranks are attached.

    RankLost when a peer's process has ended (seen within milliseconds), when someone aborts, or when a peer
    keeps this rank waiting for `timeout_s`.
    """

    def __init__(
        self, path: Path, *, rank: int, size: int, timeout_s: float, attach_timeout_s: float
    ) -> None:
        assert size > 1, "a group of one needs no shared memory"
        self.rank = rank
        self.size = size
        self._timeout_s = timeout_s
        self._bytes = (1 + size) * _LINE_WORDS * 8
        self._slab_start = -(-self._bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._total_bytes = self._slab_start + 2 * size * SLAB_BYTES
        deadline_s = time.monotonic() + attach_timeout_s
        self._map = self._create(path, deadline_s) if rank == 0 else self._join(path, deadline_s)
        self._words = memoryview(self._map).cast("q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._own = self._line(rank)
        self._peers = [(peer, self._line(peer)) for peer in range(size) if peer != rank]
        self._slabs: dict[torch.dtype, tuple[tuple[torch.Tensor, ...], ...]] = {}
        self._count = 0
        self._deaths = select.poll()
        self._pidfds = {self._watch(peer, line): peer for peer, line in self._peers}

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` (contiguous, on the CPU) over the ranks, in place; half precision is summed in float32."""
        flat = x.view(-1)
        limit = SLAB_BYTES // x.element_size()
        for start in range(0, flat.numel(), limit):
            piece = flat[start : start + limit]
            _add_up([slab[: len(piece)] for slab in self._exchange(piece)], out=piece)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of every rank, stacked in rank order."""
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype)
        flat, rows = x.reshape(-1), gathered.view(self.size, -1)
        limit = SLAB_BYTES // x.element_size()
        for start in range(0, flat.numel(), limit):
            piece = flat[start : start + limit]
            for peer, slab in enumerate(self._exchange(piece)):
                rows[peer, start : start + limit] = slab[: len(piece)]
        return gathered

    def set_timeout(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def all_gather_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Every rank's `counts[rank]` rows, in rank order. Nobody pads, nobody reads more than there is."""
        gathered = x.new_empty((sum(counts), *x.shape[1:]))
        width = math.prod(x.shape[1:])
        flat, parts = x.reshape(-1), gathered.view(-1).split_with_sizes([count * width for count in counts])
        limit = SLAB_BYTES // x.element_size()
        for start in range(0, max(counts) * width, limit):
            slabs = self._exchange(flat[start : start + limit])
            for part, slab in zip(parts, slabs, strict=True):
                piece = part[start : start + limit]
                piece.copy_(slab[: len(piece)])
        return gathered

    def reduce_scatter_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """This rank's `counts[rank]` rows of the sum; half precision is summed in float32."""
        width = math.prod(x.shape[1:])
        begin = sum(counts[: self.rank]) * width
        end = begin + counts[self.rank] * width
        flat, own = x.view(-1), x.new_empty((counts[self.rank], *x.shape[1:]))
        limit = SLAB_BYTES // x.element_size()
        for start in range(0, len(flat), limit):
            slabs = self._exchange(flat[start : start + limit])
            low, high = max(begin, start), min(end, start + limit)
            if low < high:
                parts = [slab[low - start : high - start] for slab in slabs]
                _add_up(parts, out=own.view(-1)[low - begin : high - begin])
        return own

    def barrier(self, timeout_s: float | None = None) -> None:
        """Return when every rank is here. `timeout_s` None: the timeout of every operation."""
        self._publish()
        self._wait_for_peers(self._timeout_s if timeout_s is None else timeout_s)

    def abort(self) -> None:
        """Make every rank's current and next operation raise RankLost. Safe from any thread."""
        self._words[_ABORT_WORD] = 1
        fence()
        for peer in range(self.size):
            futex_wake(self._address + 8 * self._line(peer), self.size)

    def close(self) -> None:
        """Drop the mapping. Peers still waiting see an abort only if `abort` was called."""
        for pidfd in self._pidfds:
            if pidfd >= 0:
                os.close(pidfd)
        self._pidfds.clear()
        self._slabs.clear()

    def _exchange(self, piece: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Put `piece` into the own slab; all ranks' slabs, valid until the next operation but one."""
        slabs = self._slabs_of(piece.dtype)[(self._count + 1) & 1]
        slabs[self.rank][: len(piece)] = piece
        self._publish()
        self._wait_for_peers(self._timeout_s)
        return slabs

    def _publish(self) -> None:
        self._count += 1
        fence()
        self._words[self._own + _COUNT] = self._count
        fence()
        if any(self._words[line + _SLEEPING] for _, line in self._peers):
            futex_wake(self._address + 8 * self._own, self.size)

    def _wait_for_peers(self, timeout_s: float) -> None:
        words, count = self._words, self._count
        for peer, line in self._peers:
            for _ in range(_SPIN_COUNT):
                if words[line] >= count:
                    break
            else:
                self._wait_long(peer, line, timeout_s)
        if words[_ABORT_WORD]:
            raise RankLost("the group was aborted")
        fence()

    def _wait_long(self, peer: int, line: int, timeout_s: float) -> None:
        """Offer the processor to others, then sleep; the peer wakes those who said they sleep."""
        words, count = self._words, self._count
        for _ in range(_YIELD_COUNT):
            if words[line] >= count:
                return
            os.sched_yield()
        deadline_s = time.monotonic() + timeout_s
        words[self._own + _SLEEPING] = 1
        fence()
        try:
            while (seen := words[line]) < count:
                futex_wait(self._address + 8 * line, seen, _SLEEP_S)
                if words[_ABORT_WORD]:
                    raise RankLost("the group was aborted")
                self._refuse_dead_peers(line)
                if time.monotonic() > deadline_s:
                    raise RankLost(f"rank {peer} kept rank {self.rank} waiting for {timeout_s} s")
        finally:
            words[self._own + _SLEEPING] = 0

    def _refuse_dead_peers(self, line: int) -> None:
        if self._words[line] >= self._count:
            return
        for pidfd, _ in self._deaths.poll(0):
            raise RankLost(f"the process of rank {self._pidfds[pidfd]} ended")

    def _watch(self, peer: int, line: int) -> int:
        """A descriptor that turns readable when the peer's process ends, even unreaped; -1 without one."""
        try:
            pidfd = os.pidfd_open(self._words[line + _PID])
        except ProcessLookupError as error:
            raise RankLost(f"the process of rank {peer} ended while the group attached") from error
        except (OSError, AttributeError):
            # Kernels without pidfd: a dead peer shows as a timeout.
            return -peer - 1
        self._deaths.register(pidfd, select.POLLIN)
        return pidfd

    def _slabs_of(self, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], ...]:
        slabs = self._slabs.get(dtype)
        if slabs is None:
            count = SLAB_BYTES // dtype.itemsize
            slabs = self._slabs[dtype] = tuple(
                tuple(
                    torch.frombuffer(
                        self._map,
                        dtype=dtype,
                        count=count,
                        offset=self._slab_start + (2 * peer + parity) * SLAB_BYTES,
                    )
                    for peer in range(self.size)
                )
                for parity in (0, 1)
            )
        return slabs

    @staticmethod
    def _line(rank: int) -> int:
        """The first word of a rank's line; line 0 belongs to the group."""
        return (1 + rank) * _LINE_WORDS

    def _create(self, path: Path, deadline_s: float) -> mmap.mmap:
        """Rank 0: a complete file appears under `path` at once, replacing what a dead group may have left."""
        private = path.with_name(f"{path.name}.{os.getpid()}")
        descriptor = os.open(private, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)
        try:
            # Reserve the pages now: a full file system is an error here, but a SIGBUS later.
            os.posix_fallocate(descriptor, 0, self._total_bytes)
            mapped = mmap.mmap(descriptor, self._total_bytes)
            words = memoryview(mapped).cast("q")
            words[_SIZE_WORD] = self.size
            words[self._line(0) + _PID] = os.getpid()
            words[_MAGIC_WORD] = _MAGIC
            private.rename(path)
        except OSError as error:
            private.unlink(missing_ok=True)
            raise RankLost(f"{path}: {self._total_bytes} bytes of shared memory: {error}") from error
        finally:
            os.close(descriptor)
        try:
            self._await_attachment(words, deadline_s)
        finally:
            path.unlink(missing_ok=True)
        return mapped

    def _await_attachment(self, words: memoryview, deadline_s: float) -> None:
        while True:
            missing = [rank for rank in range(self.size) if not words[self._line(rank) + _PID]]
            if not missing:
                words[_GO_WORD] = 1
                return
            if time.monotonic() > deadline_s:
                raise RankLost(f"ranks {missing} did not attach in time")
            time.sleep(_ATTACH_POLL_S)

    def _join(self, path: Path, deadline_s: float) -> mmap.mmap:
        """Map the file of rank 0. One left by a dead group never says go, and is replaced by rank 0."""
        while time.monotonic() < deadline_s:
            try:
                descriptor = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                time.sleep(_ATTACH_POLL_S)
                continue
            try:
                inode = os.fstat(descriptor).st_ino
                if os.fstat(descriptor).st_size != self._total_bytes:
                    time.sleep(_ATTACH_POLL_S)
                    continue
                mapped = mmap.mmap(descriptor, self._total_bytes)
            finally:
                os.close(descriptor)
            words = memoryview(mapped).cast("q")
            assert words[_MAGIC_WORD] == _MAGIC and words[_SIZE_WORD] == self.size, path
            words[self._line(self.rank) + _PID] = os.getpid()
            if self._await_go(path, inode, words, deadline_s):
                return mapped
        raise RankLost(f"rank {self.rank}: rank 0 did not open {path} in time")

    def _await_go(self, path: Path, inode: int, words: memoryview, deadline_s: float) -> bool:
        """True once rank 0 saw everyone; False when `path` is another file by now."""
        while time.monotonic() < deadline_s:
            if words[_GO_WORD]:
                return True
            try:
                if path.stat().st_ino != inode:
                    return False
            except FileNotFoundError:
                return bool(words[_GO_WORD])
            time.sleep(_ATTACH_POLL_S)
        return False


def _add_up(parts: list[torch.Tensor], out: torch.Tensor) -> None:
    """The sum in rank order."""
    if len(parts) == 2 and out.dtype not in _HALF_DTYPES:
        torch.add(parts[0], parts[1], out=out)
        return
    total = parts[0].float() if out.dtype in _HALF_DTYPES else parts[0]
    total = total + parts[1]
    for part in parts[2:]:
        total += part
    out.copy_(total)
