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
    assert pace.due_ns <= 0
    pace.note_read(0)
    assert pace.due_ns == SECOND_NS


def test_while_requests_run_a_read_comes_every_half_second(pace: ReadPace) -> None:
    pace.note_read(0)
    pace.hear(100 * MS, has_ask=False)
    assert pace.due_ns == 500 * MS
    pace.note_read(4_000 * MS)
    assert pace.due_ns == 5_000 * MS


def test_a_read_that_is_asked_for_is_half_a_poll_behind_the_last_one(pace: ReadPace) -> None:
    pace.note_read(0)
    pace.hear(10 * MS, has_ask=True)
    assert pace.due_ns == 25 * MS
    pace.note_read(50 * MS)
    assert pace.due_ns == 550 * MS


def test_who_asks_all_the_time_is_taken_to_ask_for_the_next_read_as_well(pace: ReadPace) -> None:
    """And it costs no listening."""
    now_ns = 0
    while not pace.num_assumed:
        pace.hear(now_ns + MS, has_ask=True)
        now_ns = max(now_ns + MS, pace.due_ns)
        pace.note_read(now_ns)
    assert pace.is_asked
    read_ns = pace.due_ns
    assert POLL_NS < read_ns - now_ns <= 100 * MS
    pace.note_read(read_ns)
    assert not pace.is_asked
    assert pace.due_ns - read_ns == 500 * MS


def test_a_long_poll_is_the_shortest_wait_of_all() -> None:
    pace = ReadPace(poll_ns=SECOND_NS, now_ns=0)
    pace.note_read(0)
    assert pace.due_ns == 2 * SECOND_NS


def test_for_a_watcher_that_cannot_ask_a_read_comes_every_tenth_of_a_second(pace: ReadPace) -> None:
    pace.is_silent = True
    pace.note_read(0)
    assert pace.due_ns == 100 * MS
    assert pace.edge_due_ns(0) == 100 * MS


def test_of_a_counter_an_edge_is_wanted_as_often_as_of_other_meters_and_after_each_ask(
    pace: ReadPace,
) -> None:
    assert pace.edge_due_ns(0) == SECOND_NS
    pace.hear(0, has_ask=False)
    assert pace.edge_due_ns(2_900 * MS) == 3_400 * MS
    assert pace.edge_due_ns(3_000 * MS) == 4_000 * MS
    pace.hear(1_000 * MS, has_ask=True)
    assert pace.edge_due_ns(900 * MS) == 1_000 * MS
    assert pace.edge_due_ns(1_001 * MS) == 1_501 * MS


@given(st.lists(st.integers(0, 400), min_size=1, max_size=400))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_however_often_it_is_asked_reads_come_in_time_and_ten_a_second(pauses_ms: list[int]) -> None:
    """Of a request that ends, the read is at most 100 ms later; in the long run they are 100 ms apart."""
    pace = ReadPace(poll_ns=POLL_NS, now_ns=0)
    now_ns, reads_ns = 0, [0]
    pace.note_read(0)
    for pause_ms in pauses_ms:
        asked_ns = now_ns + pause_ms * MS
        while (read_ns := max(now_ns, pace.due_ns)) < asked_ns:
            reads_ns.append(read_ns)
            pace.note_read(read_ns)
        now_ns = asked_ns
        pace.hear(now_ns, has_ask=True)
        assert pace.due_ns - now_ns <= 100 * MS
    assert all(later - earlier >= POLL_NS // 2 for earlier, later in pairwise(reads_ns))
    assert len(reads_ns) <= 12 + now_ns / (100 * MS)
