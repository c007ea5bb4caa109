"""Finds stop texts in a stream of text, and holds back what may be the beginning of one. Pure.

Generation ends at the stop text that is complete first (of two that end together, the longer), so the answer
does not depend on how the text arrives: feeding it character by character or at once cuts at the same place.
"""

from __future__ import annotations


class StopMatcher:
    """Watches the text of one answer for any of `stops` (none of them empty)."""

    __slots__ = ("_beginnings", "_held", "_longest", "_stops", "is_stopped")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
        self._longest = max((len(beginning) for beginning in self._beginnings), default=0)
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """The text that is safe to send. After a match, `is_stopped` is true and nothing more comes out."""
        if self.is_stopped:
            return ""
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.is_stopped = True
            self._held = ""
            return text[: min(matches)[1]]
        safe_end = len(text) - self._open_length(text)
        self._held = text[safe_end:]
        return text[:safe_end]

    def flush(self) -> str:
        """What is held back: the answer ended before the stop text was complete."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0
