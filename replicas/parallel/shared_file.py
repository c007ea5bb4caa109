"""A file in shared memory that all ranks of a group on one host map, and nobody else ever finds.

Rank 0 makes it appear complete under its name, the others map it and sign with their process id, then rank 0
unlinks it and says go. So a file that still has its name never said go: what a dead group left behind is
replaced by rank 0 and left again by whoever joined it. Also tells when the process of another rank has ended.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import time
from pathlib import Path

from replicas.errors import RankLost

HEADER_BYTES = 1024
MAX_RANKS = 64
_MAGIC = 0x57_4154_5449_4C
_MAGIC_WORD, _SIZE_WORD, _EPOCH_WORD, _GO_WORD, _PIDS_WORD = 0, 1, 2, 3, 8
_POLL_S = 0.002


class SharedFile:
    """One rank's mapping. The caller's bytes begin at `HEADER_BYTES`, zeroed; `words` are int64."""

    def __init__(self, mapped: mmap.mmap, *, rank: int, size: int) -> None:
        self.mapped = mapped
        self.words = memoryview(mapped).cast("q")
        self.bytes = memoryview(mapped)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._rank = rank
        self._size = size
        self._deaths = select.poll()
        self._pidfds: dict[int, int] = {}

    @classmethod
    def attach(
        cls, path: Path, *, num_bytes: int, rank: int, size: int, epoch: int, timeout_s: float
    ) -> SharedFile:
        """Return when all `size` ranks are attached. RankLost if they are not within `timeout_s`."""
        assert 1 < size <= MAX_RANKS, f"{size} ranks share a file; at least 2, at most {MAX_RANKS}"
        if rank == 0:
            return cls._create(path, num_bytes=num_bytes, size=size, epoch=epoch, timeout_s=timeout_s)
        return cls._join(path, num_bytes=num_bytes, rank=rank, size=size, epoch=epoch, timeout_s=timeout_s)

    @classmethod
    def _create(cls, path: Path, *, num_bytes: int, size: int, epoch: int, timeout_s: float) -> SharedFile:
        """Rank 0: make the file and wait for the others."""
        deadline_s = time.monotonic() + timeout_s
        shared = cls(_make(path, HEADER_BYTES + num_bytes, size, epoch), rank=0, size=size)
        try:
            while missing := [rank for rank in range(size) if not shared.words[_PIDS_WORD + rank]]:
                if time.monotonic() > deadline_s:
                    raise RankLost(f"ranks {missing} did not attach within {timeout_s:g} s")
                time.sleep(_POLL_S)
        finally:
            path.unlink(missing_ok=True)
        shared.words[_GO_WORD] = 1
        shared._watch_peers()
        return shared

    @classmethod
    def _join(
        cls, path: Path, *, num_bytes: int, rank: int, size: int, epoch: int, timeout_s: float
    ) -> SharedFile:
        """Any other rank: find the file, sign, and wait until rank 0 says go."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            opened = _open(path, HEADER_BYTES + num_bytes)
            if opened is None:
                time.sleep(_POLL_S)
                continue
            mapped, inode = opened
            shared = cls(mapped, rank=rank, size=size)
            words = shared.words
            if (words[_MAGIC_WORD], words[_SIZE_WORD], words[_EPOCH_WORD]) == (_MAGIC, size, epoch):
                words[_PIDS_WORD + rank] = os.getpid()
                if _await_go(path, inode, words, deadline_s):
                    shared._watch_peers()
                    return shared
            shared.close()
            time.sleep(_POLL_S)
        raise RankLost(f"rank {rank}: rank 0 did not open {path} within {timeout_s:g} s")

    def check_peers(self) -> None:
        """Raise RankLost if the process of another rank has ended, reaped or not."""
        for pidfd, _ in self._deaths.poll(0):
            raise RankLost(f"the process of rank {self._pidfds[pidfd]} ended")

    def close(self) -> None:
        """Let go of the mapping, which lives on where tensors are made of it. Idempotent."""
        for pidfd in self._pidfds:
            os.close(pidfd)
        self._pidfds.clear()
        self.words.release()
        self.bytes.release()

    def _watch_peers(self) -> None:
        for rank in range(self._size):
            if rank == self._rank:
                continue
            try:
                pidfd = os.pidfd_open(self.words[_PIDS_WORD + rank])
            except ProcessLookupError as error:
                raise RankLost(f"the process of rank {rank} ended while the group attached") from error
            except (OSError, AttributeError):
                # No pidfd on this kernel: a dead rank shows as one that does not answer in time.
                continue
            self._pidfds[pidfd] = rank
            self._deaths.register(pidfd, select.POLLIN)


def _make(path: Path, num_bytes: int, size: int, epoch: int) -> mmap.mmap:
    """A complete file under `path`, in place of what a dead group may have left there."""
    private = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(private, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Reserve the pages now: a full file system is an error here, but a SIGBUS later.
            os.posix_fallocate(descriptor, 0, num_bytes)
            mapped = mmap.mmap(descriptor, num_bytes)
        finally:
            os.close(descriptor)
        with memoryview(mapped).cast("q") as words:
            words[_SIZE_WORD], words[_EPOCH_WORD], words[_PIDS_WORD] = size, epoch, os.getpid()
            words[_MAGIC_WORD] = _MAGIC
        private.rename(path)
    except OSError as error:
        private.unlink(missing_ok=True)
        raise RankLost(f"{path}: cannot make {num_bytes} bytes of shared memory: {error}") from error
    return mapped


def _open(path: Path, num_bytes: int) -> tuple[mmap.mmap, int] | None:
    """The mapping and inode of the file that is under `path` now; None if it is not there or not ours."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if status.st_size != num_bytes:
            return None
        return mmap.mmap(descriptor, num_bytes), status.st_ino
    finally:
        os.close(descriptor)


def _await_go(path: Path, inode: int, words: memoryview, deadline_s: float) -> bool:
    """True once rank 0 saw everyone; False when `path` is another file by now, or time is up."""
    while not words[_GO_WORD]:
        try:
            if path.stat().st_ino != inode or time.monotonic() > deadline_s:
                return bool(words[_GO_WORD])
        except FileNotFoundError:
            # Unlinked: rank 0 says go at the next moment, or gave up.
            if time.monotonic() > deadline_s:
                return bool(words[_GO_WORD])
        time.sleep(_POLL_S)
    return True
