"""What a replica's log says of single steps: which was slow, and which sequence failed in one.

Lines name step and traces, and so do the spans of every request: either leads to the other. Of each kind
there is at most a line in so many seconds, which says how many were left out before it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from replicas.logged_traces import list_traces
from replicas.request import StepRecord
from replicas.supervisor.step_watch import StepWatch

SLOW_PERIOD_S = 10.0
FAILED_PERIOD_S = 1.0
NS_PER_MS = 1e6

logger = logging.getLogger(__name__)


class StepLog:
    """Owned by a live group. `trace_of` knows the requests that the engine holds by their numbers there."""

    def __init__(
        self,
        watch: StepWatch,
        trace_of: Callable[[int], str],
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watch = watch
        self._trace_of = trace_of
        self._slow = _Pace(SLOW_PERIOD_S, clock_s)
        self._failed = _Pace(FAILED_PERIOD_S, clock_s)

    def note_step(self, record: StepRecord) -> None:
        """Call it before the watch hears of the step, and before those that ended in it are forgotten."""
        duration_ns = record.end_ns - record.start_ns
        if not self._watch.is_slow(duration_ns / 1e9) or not self._slow.admits():
            return
        logger.warning(
            "slow_step step=%d ms=%.0f p99_ms=%.1f sequences=%d prompt_tokens=%d left_out=%d traces=%s",
            *(record.step, duration_ns / NS_PER_MS, self._watch.step_s_p99 * 1e3, len(record.rows)),
            *(record.rows.num_prompt_tokens, self._slow.take_left_out()),
            # The last rows first: chunks of prompts, which take longest, come behind the decoding sequences.
            list_traces(map(self._trace_of, reversed(record.rows.ids))),
        )

    def note_failure(self, step: int, engine_id: int, error: tuple[str, str]) -> None:
        """Of a sequence that the engine refused, or that failed alone: its status, and why."""
        if not self._failed.admits():
            return
        logger.warning(
            "sequence_failed step=%d code=%s reason=%s left_out=%d trace=%s",
            *(step, *error, self._failed.take_left_out(), self._trace_of(engine_id)),
        )


class _Pace:
    """Lets one through in each period. Mutable."""

    def __init__(self, period_s: float, clock_s: Callable[[], float]) -> None:
        self._period_s = period_s
        self._clock_s = clock_s
        self._next_s = float("-inf")
        self._num_left_out = 0

    def admits(self) -> bool:
        now_s = self._clock_s()
        if now_s < self._next_s:
            self._num_left_out += 1
            return False
        self._next_s = now_s + self._period_s
        return True

    def take_left_out(self) -> int:
        """How many were not let through since it was asked last."""
        count, self._num_left_out = self._num_left_out, 0
        return count
