"""`up` says why replicas are missing: late, once, and without waiting for a Ray that does not answer."""

from __future__ import annotations

import io
import threading

from rich.console import Console

from cluster.commands.shortage import ASK_AFTER_S, Shortage


class Told:
    """A Ray that knows a reason after it was asked a few times, and a screen."""

    def __init__(self, answers: list[list[str]]) -> None:
        self.now_s = 0.0
        self.screen = io.StringIO()
        self.answers = answers
        self.shortage = Shortage(self.reasons, Console(file=self.screen), clock_s=lambda: self.now_s)

    def reasons(self) -> list[str]:
        return self.answers.pop(0)

    def note(self, is_short: bool = True) -> None:
        self.now_s += ASK_AFTER_S
        self.shortage.note(is_short)
        join_questions()


def join_questions() -> None:
    """Until nobody asks any more."""
    for thread in threading.enumerate():
        if thread.name == "shortage":
            thread.join()


def test_a_reason_is_asked_for_until_there_is_one_and_said_once() -> None:
    told = Told([[], ["no room"], ["no room"]])
    for _ in range(5):
        told.note()
    assert (told.screen.getvalue(), told.answers) == ("no room\n", [["no room"]])
    told.note(is_short=False)
    for _ in range(3):
        told.note()
    assert (told.screen.getvalue(), told.answers) == ("no room\nno room\n", [])


def test_a_replica_that_is_back_soon_needs_no_words() -> None:
    told = Told([])
    told.note()
    told.note(is_short=False)
    told.note()
    assert told.screen.getvalue() == ""


def test_a_ray_that_does_not_answer_is_asked_once_and_holds_up_nothing() -> None:
    answers, asked = threading.Event(), []

    def reasons() -> list[str]:
        asked.append(1)
        answers.wait()
        return []

    now_s = 0.0
    shortage = Shortage(reasons, Console(file=io.StringIO()), clock_s=lambda: now_s)
    for _ in range(5):
        shortage.note(True)
        now_s += ASK_AFTER_S
    answers.set()
    join_questions()
    assert asked == [1]
