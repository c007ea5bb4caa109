"""Keeps which steps a sequence was in, for a comparison and a reference per token.

Counts of steps are those of chunks and tokens: a sequence has one row in a step, which gives one token or,
while its prompt is not at its end, none. Pure; owned by a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicas.record import record
from replicas.step_trail import StepTrail, TokenGap

NS_PER_US = 1_000


@record
class StepEnd:
    """A step, and when it was done: monotonic nanoseconds. One object for all sequences in it."""

    step: int
    at_ns: int


NEVER = StepEnd(step=0, at_ns=0)
"""Steps are counted from 1."""


@dataclass(slots=True)
class Trail:
    """Mutable. `take_chunk` or `take_token` is told of every step whose outcome the sequence lived to see."""

    first_step: int = 0
    first_token: StepEnd = NEVER
    _last_token: StepEnd = NEVER
    _last_silent_step: int = 0
    _num_silent: int = 0
    """Steps that gave no token."""
    _num_silent_prefills: int = 0
    """Of them, before the first token."""
    _gap_ns: int = -1
    """The longest so far. Anything is longer than none: the first token needs no question of its own."""
    _gap_end: StepEnd = NEVER

    def take_chunk(self, step: int) -> None:
        """It was in a step that gave it no token."""
        self.first_step = self.first_step or step
        self._last_silent_step = step
        self._num_silent += 1

    def take_token(self, end: StepEnd) -> None:
        """Once per token."""
        if end.at_ns - self._last_token.at_ns > self._gap_ns:
            self._note_gap(end)
        self._last_token = end

    def told(self, *, num_tokens: int) -> StepTrail | None:
        """What is said at the end of a sequence that gave `num_tokens`. None: it was in no step."""
        if not self.first_step:
            return None
        has_token = self.first_token is not NEVER
        num_prefills = self._num_silent_prefills + 1 if has_token else self._num_silent
        return StepTrail(
            first_step=self.first_step,
            first_token_step=self.first_token.step if has_token else None,
            last_step=max(self._last_token.step, self._last_silent_step),
            num_prefill_steps=num_prefills,
            num_decode_steps=num_tokens + self._num_silent - num_prefills,
            longest_gap=self._longest_gap(),
        )

    def _note_gap(self, end: StepEnd) -> None:
        """The first token, or one that was longer in coming than any before."""
        if self.first_token is NEVER:
            self.first_step = self.first_step or end.step
            self.first_token = end
            self._num_silent_prefills = self._num_silent
            self._gap_ns = 0
        else:
            self._gap_ns = end.at_ns - self._last_token.at_ns
            self._gap_end = end

    def _longest_gap(self) -> TokenGap | None:
        end = self._gap_end
        if end is NEVER:
            return None
        return TokenGap(
            duration_us=self._gap_ns // NS_PER_US,
            end_us=(end.at_ns - self.first_token.at_ns) // NS_PER_US,
            step=end.step,
        )
