"""When meters are read that can be read at any time: by what watchers say, and never too often."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.energy.read_pace import ReadPace

MS = 1_000_000
POLL_NS = 50 * MS
SECOND_NS = 1_000 * MS


@pytest.fixture
def pace() -> ReadPace:
    return ReadPace(poll_ns=POLL_NS, now_ns=0)


def test_the_first_read_is_at_once_and_later_ones_are_rare_while_nothing_runs(pace: ReadPace) -> None:
    assert pace.due_ns() <= 0
    pace.note_read(0)
    assert pace.due_ns() == SECOND_NS


def test_while_requests_run_a_read_comes_every_half_second(pace: ReadPace) -> None:
    pace.note_read(0)
    pace.hear_running(100 * MS)
    assert pace.due_ns() == 500 * MS
    pace.note_read(4_000 * MS)
    assert pace.due_ns() == 5_000 * MS


def test_a_read_that_is_asked_for_is_half_a_poll_behind_the_last_one(pace: ReadPace) -> None:
    pace.note_read(0)
    pace.hear_ask(10 * MS)
    assert pace.due_ns() == 25 * MS
    pace.note_read(50 * MS)
    assert pace.due_ns() == 550 * MS


def test_while_it_is_asked_all_the_time_it_need_not_listen_until_the_next_read(pace: ReadPace) -> None:
    for _ in range(30):
        pace.hear_ask(pace.due_ns())
        pace.note_read(pace.due_ns())
    last_ns = pace.deaf_until_ns - 100 * MS
    pace.hear_ask(last_ns + 10 * MS)
    assert pace.due_ns() == pace.deaf_until_ns


def test_for_a_watcher_that_cannot_ask_a_read_comes_every_tenth_of_a_second(pace: ReadPace) -> None:
    pace.is_silent = True
    pace.note_read(0)
    assert pace.due_ns() == 100 * MS
    assert pace.edge_gap_ns(0) == 100 * MS


def test_edges_of_a_counter_are_wanted_ten_times_a_second_and_once_while_nothing_runs(pace: ReadPace) -> None:
    assert pace.edge_gap_ns(0) == SECOND_NS
    pace.hear_running(0)
    assert pace.edge_gap_ns(2_900 * MS) == 100 * MS
    assert pace.edge_gap_ns(3_000 * MS) == SECOND_NS


@given(st.lists(st.integers(0, 400), min_size=1, max_size=400))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_however_often_it_is_asked_reads_come_in_time_and_ten_a_second(pauses_ms: list[int]) -> None:
    """Of a request that ends, the read is at most 100 ms later; in the long run they are 100 ms apart."""
    pace = ReadPace(poll_ns=POLL_NS, now_ns=0)
    now_ns, reads_ns = 0, [0]
    pace.note_read(0)
    for pause_ms in pauses_ms:
        asked_ns = now_ns + pause_ms * MS
        while pace.due_ns() < asked_ns:
            reads_ns.append(pace.due_ns())
            pace.note_read(pace.due_ns())
        now_ns = asked_ns
        pace.hear_ask(now_ns)
        assert pace.due_ns() - now_ns <= 100 * MS
    assert all(later - earlier >= POLL_NS // 2 for earlier, later in pairwise(reads_ns))
    assert len(reads_ns) <= 12 + now_ns / (100 * MS)
