"""How far another host's monotonic clock is from ours, from questions and answers. Pure: times come in.

Cristian's method (Distributed Computing 3, 1989): an answer was given half-way between question and arrival,
and is wrong by half the round trip at most. The best one counts until its age makes it worse than a newer.
"""

from __future__ import annotations

_DRIFT_PPM = 50
"""Two quartz clocks run apart by no more."""


class HostClock:
    """One other host. One owner."""

    def __init__(self) -> None:
        self._ahead_ns: int | None = None
        self._error_ns = 0
        self._asked_ns = 0

    @property
    def is_known(self) -> bool:
        return self._ahead_ns is not None

    def error_ns(self, now_ns: int) -> int:
        """By how much `to_ours` may be wrong, if at all known."""
        return self._error_ns + (now_ns - self._asked_ns) * _DRIFT_PPM // 10**6

    def note(self, *, asked_ns: int, theirs_ns: int, answered_ns: int) -> None:
        """They said `theirs_ns` between two times of ours."""
        error_ns = (answered_ns - asked_ns + 1) // 2
        if self._ahead_ns is None or error_ns <= self.error_ns(answered_ns):
            self._ahead_ns = theirs_ns - (asked_ns + answered_ns) // 2
            self._error_ns, self._asked_ns = error_ns, answered_ns

    def to_ours(self, theirs_ns: int) -> int:
        assert self._ahead_ns is not None, "ask before you convert"
        return theirs_ns - self._ahead_ns
