"""Sleep in the kernel until another process changes a word of shared memory.

Owns the futex system call and the memory fence that goes with it. The futexes are not private, so they work
between processes that map the same file. Called by the plan ring and by the shared-memory collectives.
Where there is no futex (not Linux, another processor) a wait is a short sleep; callers loop anyway.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys
import threading
import time

_WAIT = 0
_WAKE = 1
_SYSCALLS = {"x86_64": 202, "aarch64": 98}
_SYSCALL = _SYSCALLS.get(platform.machine(), 0) if sys.platform == "linux" else 0
_FALLBACK_SLEEP_S = 0.0005
_WORD_MASK = 0xFFFF_FFFF
_fence_lock = threading.local()


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


if _SYSCALL:
    _libc_syscall = ctypes.CDLL(None, use_errno=True).syscall
    _libc_syscall.restype = ctypes.c_long


def futex_wait(address: int, expected: int, timeout_s: float) -> bool:
    """Sleep while the 32-bit word at `address` equals the low 32 bits of `expected`.

    False after `timeout_s`; True when woken, when the word differs, or on a stray signal: check again. The
    word of a little-endian int64 counter is at the counter's own address. Releases the interpreter lock.
    """
    if not _SYSCALL:
        time.sleep(min(timeout_s, _FALLBACK_SLEEP_S))
        return True
    seconds = int(timeout_s)
    timeout = _Timespec(seconds, int((timeout_s - seconds) * 1e9))
    result = _libc_syscall(
        ctypes.c_long(_SYSCALL),
        ctypes.c_void_p(address),
        ctypes.c_int(_WAIT),
        ctypes.c_uint32(expected & _WORD_MASK),
        ctypes.byref(timeout),
        None,
        ctypes.c_int(0),
    )
    return bool(result == 0 or ctypes.get_errno() != errno.ETIMEDOUT)


def futex_wake(address: int, count: int) -> int:
    """Wake at most `count` sleepers on the word at `address`; how many there were."""
    if not _SYSCALL:
        return 0
    woken = _libc_syscall(
        ctypes.c_long(_SYSCALL),
        ctypes.c_void_p(address),
        ctypes.c_int(_WAKE),
        ctypes.c_int(count),
        None,
        None,
        ctypes.c_int(0),
    )
    return int(woken)


def fence() -> None:
    """Order every earlier store before every later load and store, as other processors see them.

    Taking a free lock is an atomic read-modify-write: a full barrier on x86. On ARM a release followed by an
    acquire is one, hence twice. About 100 ns.
    """
    lock = getattr(_fence_lock, "lock", None)
    if lock is None:
        lock = _fence_lock.lock = threading.Lock()
    lock.acquire()
    lock.release()
    lock.acquire()
    lock.release()
