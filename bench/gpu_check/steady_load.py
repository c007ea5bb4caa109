"""A load that runs for some seconds, with what it did and what it drew: speed and joules come from here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.gpu_check.energy_trace import Counter, EnergyTrace, EnergyWindow, done_at, widest_window

_RAMP_S = 0.1
"""Left out at the start of an energy window: clocks and power are still rising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """`tokens_per_s` over the whole run; joules from a window between edges of the counter, None without."""

    tokens_per_s: float
    window: EnergyWindow | None = None
    window_tokens: float = 0.0

    def energy_row(self, idle_w: float | None) -> dict[str, object]:
        """J per token: all, what the idle GPU would have drawn in that time, and the rest."""
        if self.window is None or not self.window_tokens:
            return {}
        total_j = self.window.energy_j / self.window_tokens
        row: dict[str, object] = {"watts": self.window.power_w, "j_per_token": total_j}
        if idle_w is not None:
            static_j = idle_w * (self.window.end_s - self.window.start_s) / self.window_tokens
            row |= {"j_per_token_static": static_j, "j_per_token_dynamic": total_j - static_j}
        return row


def run_load(
    run_round: Callable[[], float],
    synchronize: Callable[[], None],
    *,
    seconds: float,
    counter: Counter | None = None,
    poll_s: float = 0.005,
) -> LoadResult:
    """Repeat `run_round`, which enqueues work and returns its tokens, for `seconds`; one round at least."""
    run_round()
    synchronize()
    if counter is None:
        return LoadResult(tokens_per_s=_rate(_rounds(run_round, synchronize, seconds)))
    with EnergyTrace(counter, period_s=poll_s) as trace:
        marks = _rounds(run_round, synchronize, seconds)
    window = widest_window(trace.edges, marks[0][0] + _RAMP_S, marks[-1][0])
    if window is None:
        return LoadResult(tokens_per_s=_rate(marks))
    tokens = done_at(marks, window.end_s) - done_at(marks, window.start_s)
    return LoadResult(tokens_per_s=_rate(marks), window=window, window_tokens=tokens)


def _rounds(
    run_round: Callable[[], float], synchronize: Callable[[], None], seconds: float
) -> list[tuple[float, float]]:
    began_s = time.perf_counter()
    marks, done = [(began_s, 0.0)], 0.0
    while marks[-1][0] - began_s < seconds:
        done += run_round()
        synchronize()
        marks.append((time.perf_counter(), done))
    return marks


def _rate(marks: list[tuple[float, float]]) -> float:
    return marks[-1][1] / (marks[-1][0] - marks[0][0])
