"""A futex wait ends by a wake, by a changed word, or by its timeout."""

from __future__ import annotations

import ctypes
import mmap
import threading

from replicas.parallel.futex import fence, futex_wait, futex_wake


class Word:
    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.words = (ctypes.c_int64 * 8).from_buffer(self.memory)
        self.address = ctypes.addressof(self.words)


def test_a_word_that_already_changed_does_not_sleep() -> None:
    word = Word()
    word.words[0] = 5
    assert futex_wait(word.address, 4, 60.0)


def test_an_unchanged_word_times_out() -> None:
    word = Word()
    assert not futex_wait(word.address, 0, 0.001)


def test_a_wake_ends_the_sleep() -> None:
    word = Word()
    done = threading.Event()

    def sleeper() -> None:
        while word.words[0] == 0:
            futex_wait(word.address, 0, 60.0)
        done.set()

    thread = threading.Thread(target=sleeper)
    thread.start()
    word.words[0] = 1
    fence()
    futex_wake(word.address, 1)
    thread.join(timeout=30.0)
    assert done.is_set()
