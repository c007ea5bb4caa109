"""What watchers tell the agent through a pipe, and calls into drivers that never return."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from replicas.energy.aside_call import AsideCalls
from replicas.energy.ask_pipe import ASK, RUNNING, Asker, AskPipe
from replicas.errors import MeterUnavailable

SECOND_NS = 1_000_000_000


def test_words_of_all_watchers_come_out_as_one(tmp_path: Path) -> None:
    now_ns = [10 * SECOND_NS]
    pipe = AskPipe(tmp_path / "asks")
    askers = [Asker(clock=lambda: now_ns[0]) for _ in range(2)]
    askers[0].ask()
    assert pipe.take() == b"", "nobody has opened it"
    for asker in askers:
        asker.open(str(pipe.path))
    askers[0].note_running()
    assert pipe.wait(60.0)
    assert pipe.take() == RUNNING
    askers[0].note_running()
    assert pipe.take() == b"", "it was said a moment ago"
    now_ns[0] += 2 * SECOND_NS
    askers[0].note_running()
    askers[1].ask()
    assert pipe.take() == RUNNING + ASK
    pipe.close(keeps_file=False)
    askers[0].ask()
    assert not pipe.path.exists()
    for asker in askers:
        asker.close()


def test_a_pipe_that_nobody_empties_stops_no_watcher(tmp_path: Path) -> None:
    pipe = AskPipe(tmp_path / "asks")
    asker = Asker()
    asker.open(str(pipe.path))
    for _ in range(70_000):
        asker.ask()
    assert ASK in pipe.take()
    asker.close()
    pipe.close(keeps_file=False)


async def test_a_call_that_does_not_return_is_left_behind_and_its_late_result_dropped() -> None:
    calls = AsideCalls(timeout_s=0.01, limit=1)
    goes_on, dropped = threading.Event(), asyncio.Event()

    def hang() -> int:
        goes_on.wait()
        return 7

    with pytest.raises(MeterUnavailable, match=r"did not answer within 0\.01 s"):
        await calls.run(hang, drop=lambda late: dropped.set() if late == 7 else None)
    with pytest.raises(MeterUnavailable, match="1 calls into meters of this host do not return"):
        await calls.run(hang)
    goes_on.set()
    await asyncio.wait_for(dropped.wait(), 60.0)


async def test_a_call_gives_what_it_returns_or_raises() -> None:
    calls = AsideCalls(timeout_s=60.0)
    assert await calls.run(lambda: 3) == 3
    with pytest.raises(KeyError, match="gone"):
        await calls.run(lambda: dict[str, int]()["gone"])
