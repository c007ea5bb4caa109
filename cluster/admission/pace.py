"""How fast a queue drains, and when an engine takes more. Pure.

Engines serve in order of priority and arrival, so this router gives them little more than they can begin at
once: what waits here can still be put in a fairer order, or refused. Where there is neither another tenant to
be fair to nor an objective to refuse for, an engine gets all it has rows for: it shares its time between
prompts and answers by how many wait, and cannot count those that wait here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.balancing.lane_view import LaneView
from cluster.balancing.prediction import has_kv_for, prefill_rate

AHEAD_S = 0.1
"""Of prefill work at an engine: enough to keep it busy until its next snapshot."""
SPARE_ROWS_SHARE = 16
"""One request in so many rows may wait for a row, so that a row that gets free is taken at once."""
WINDOW = 32
"""Departures that the pace is measured over."""
MIN_DEPARTURES = 8
SPREAD, MIN_SPREAD, MAX_SPREAD = 3.0, 1.0, 12.0
"""Of waits, in standard deviations of rows that get free at random: where it begins, and its bounds."""
RISE, FALL = 0.3, 0.006
"""What the spread learns from a wait that was longer, or shorter: it comes to lie above 98 in 100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of a wait. Two in a hundred take longer than `late_s`, which is counted in `deviation_s`."""

    mean_s: float = 0.0
    late_s: float = 0.0
    deviation_s: float = 0.0


def takes_more(lane: LaneView, *, uncached_tokens: int, output_tokens: int, ahead_s: float = AHEAD_S) -> bool:
    """Whether the engine has a row for this request, and begins it within `ahead_s`.

    An idle one takes anything: it knows best.
    """
    if lane.num_requests == 0:
        return True
    has_row = lane.num_requests < lane.max_sequences + max(1, lane.max_sequences // SPARE_ROWS_SHARE)
    is_soon = lane.num_prefill_tokens <= ahead_s * prefill_rate(lane)
    return (
        has_row and is_soon and has_kv_for(lane, uncached_tokens=uncached_tokens, output_tokens=output_tokens)
    )


class Pace:
    """Tokens a second that leave a queue which never runs empty. Mutable; time comes in.

    Were rows to get free at random, n departures would take n gaps on average, and the square root of n gaps
    would be their deviation: a short queue is the least certain one, in proportion. Rows may also get free in
    waves, as of answers of one length; `spread` learns what waits exceed the mean by, in such deviations.
    """

    def __init__(self) -> None:
        self._departures: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self.spread = SPREAD

    def left(self, tokens: int, *, now_s: float) -> None:
        """A request of so many tokens was given to an engine; where no other waits, `ran_empty` follows."""
        self._departures.append((now_s, tokens))

    def waited(self, forecast: Forecast, *, actual_s: float) -> None:
        """A request that was let into the queue with this forecast has left it."""
        if forecast.deviation_s > 0.0:
            step = RISE if actual_s - forecast.mean_s > self.spread * forecast.deviation_s else -FALL
            self.spread = max(MIN_SPREAD, min(MAX_SPREAD, self.spread + step))

    def ran_empty(self) -> None:
        """From now on the pace is that of the arrivals, which says nothing."""
        self._departures.clear()

    def forecast(
        self,
        tokens_ahead: float,
        lanes: Iterable[LaneView],
        *,
        prompt_tokens: int,
        output_tokens: int,
        now_s: float,
    ) -> Forecast:
        """Until so many tokens have left and one request more: by what was measured, else by what the lanes
        should manage.

        Whose turn it is needs one row, however long its answer: it counts as a typical request. Before there
        were any, that is the newcomer.
        """
        first_s = self._departures[0][0] if len(self._departures) >= MIN_DEPARTURES else now_s
        if now_s > first_s:
            num_left = len(self._departures) - 1
            tokens = sum(tokens for _, tokens in self._departures) - self._departures[0][1]
            gap_s, typical_tokens = (now_s - first_s) / num_left, tokens / num_left
        else:
            requests_per_s = sum(
                [
                    _requests_per_s(lane, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
                    for lane in lanes
                ]
            )
            if requests_per_s == 0.0:
                return Forecast()
            gap_s, typical_tokens = 1.0 / requests_per_s, float(prompt_tokens + output_tokens)
        num_gaps = 1.0 + tokens_ahead / max(1.0, typical_tokens)
        mean_s, deviation_s = num_gaps * gap_s, math.sqrt(num_gaps) * gap_s
        return Forecast(mean_s=mean_s, late_s=mean_s + self.spread * deviation_s, deviation_s=deviation_s)


def _requests_per_s(lane: LaneView, *, prompt_tokens: int, output_tokens: int) -> float:
    """Bound by the prefill of the prompts or by the rows that the answers need, whichever takes longer."""
    row_s = output_tokens * lane.step_ms / 1e3 / lane.max_sequences
    return 1.0 / max(prompt_tokens / prefill_rate(lane), row_s)
