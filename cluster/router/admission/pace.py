"""How fast a queue drains, and when an engine takes more. Pure.

Engines serve in order of arrival, so this router gives them little more than they can begin at once: what
waits here can still be put in a fairer order, or refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from cluster.router.balancing.lane_view import LaneView
from cluster.router.balancing.prediction import has_kv_for, prefill_rate

AHEAD_S = 0.1
"""Of prefill work at an engine: enough to keep it busy until its next snapshot."""
SPARE_ROWS_SHARE = 16
"""One request in so many rows may wait for a row, so that a row that gets free is taken at once."""
WINDOW = 32
"""Departures that the pace is measured over."""
MIN_DEPARTURES = 8
RISE, FALL = 0.3, 0.03
"""How fast the correction follows waits longer, and shorter, than predicted: it aims at the long ones."""
MAX_CORRECTION = 20.0


def takes_more(lane: LaneView, *, uncached_tokens: int, output_tokens: int) -> bool:
    """Whether the engine would begin this request soon. An idle one takes anything: it knows best."""
    if lane.num_requests == 0:
        return True
    has_row = lane.num_requests < lane.max_sequences + max(1, lane.max_sequences // SPARE_ROWS_SHARE)
    is_soon = lane.num_prefill_tokens <= AHEAD_S * prefill_rate(lane)
    return (
        has_row and is_soon and has_kv_for(lane, uncached_tokens=uncached_tokens, output_tokens=output_tokens)
    )


class Pace:
    """Tokens a second that leave a queue which never runs empty. Mutable; time comes in.

    Rows may get free in waves, as of answers of one length: `correction` is what predictions fell short by.
    """

    def __init__(self) -> None:
        self._departures: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self.correction = 1.0

    def left(self, tokens: int, *, now_s: float) -> None:
        """A request of so many tokens was given to an engine, and others wait."""
        self._departures.append((now_s, tokens))

    def waited(self, *, predicted_s: float, actual_s: float) -> None:
        """A request that was let into the queue with this prediction, correction included, has left it."""
        ratio = self.correction * actual_s / max(predicted_s, 1e-3)
        pace = RISE if ratio > self.correction else FALL
        self.correction += pace * (ratio - self.correction)
        self.correction = max(1.0, min(MAX_CORRECTION, self.correction))

    def ran_empty(self) -> None:
        """From now on the pace is that of the arrivals, which says nothing."""
        self._departures.clear()

    def wait_s(
        self,
        tokens_ahead: float,
        lanes: Iterable[LaneView],
        *,
        prompt_tokens: int,
        output_tokens: int,
        now_s: float,
    ) -> float:
        """Until so many tokens have left: by what was measured, else by what the lanes should manage.

        The lengths are those of a typical request: that of the newcomer.
        """
        if tokens_ahead <= 0.0:
            return 0.0
        first_s = self._departures[0][0] if len(self._departures) >= MIN_DEPARTURES else now_s
        if now_s > first_s:
            tokens = sum(tokens for _, tokens in self._departures) - self._departures[0][1]
            return self.correction * tokens_ahead * (now_s - first_s) / max(1, tokens)
        requests_per_s = sum(
            [
                _requests_per_s(lane, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
                for lane in lanes
            ]
        )
        if requests_per_s == 0.0:
            return 0.0
        return self.correction * tokens_ahead / ((prompt_tokens + output_tokens) * requests_per_s)


def _requests_per_s(lane: LaneView, *, prompt_tokens: int, output_tokens: int) -> float:
    """Bound by the prefill of the prompts or by the rows that the answers need, whichever takes longer."""
    row_s = output_tokens * lane.step_ms / 1e3 / lane.max_sequences
    return 1.0 / max(prompt_tokens / prefill_rate(lane), row_s)
