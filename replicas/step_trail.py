"""Where in the run of an engine's steps a sequence was. Plain data, said once, when the sequence ends.

A step is known by its number, which counts on for the whole life of an engine, warm-up included. A sequence
may be left out of steps between its first and its last: its prompt waits for room, or it is preempted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGap:
    """Time between two tokens of a sequence. It ended with `step`, `end_us` behind the first token."""

    duration_us: int
    end_us: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrail:
    """Of a sequence that was in a step at all. `first_token_step` None: it gave no token.

    Prefill steps are those up to its first token, each with a chunk of its prompt; decode steps all others:
    one for each later token, and those that computed again what a preemption had taken. What was under way
    for it when it ended is not counted. `longest_gap` None: it gave fewer than two tokens, or all at once.
    """

    first_step: int
    first_token_step: int | None
    last_step: int
    num_prefill_steps: int
    num_decode_steps: int
    longest_gap: TokenGap | None

    @property
    def num_steps(self) -> int:
        return self.num_prefill_steps + self.num_decode_steps
