"""The requests that ended last, and how well the last answers did. Pure: time comes in.

Counts, times and joules only: there is no text of a prompt or an answer in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from cluster.energy.account import EnergyAccount
from cluster.request.answer import Timing, Usage

LAST_REQUESTS = 50
WINDOW_S = 30.0
"""Percentiles and joules per token are over this much time."""
MAX_WINDOW = 1024
"""Answers in it, at most: a model that gives more in that time is described by its last ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What an answer has to keep, in milliseconds. None: no such objective."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def exists(self) -> bool:
        return self.ttft_ms is not None or self.tpot_ms is not None

    def is_met(self, *, ttft_ms: float | None, tpot_ms: float | None) -> bool:
        """`ttft_ms` None: no token came, which meets nothing. `tpot_ms` None: there was only one token."""
        if ttft_ms is None:
            return False
        is_first_in_time = self.ttft_ms is None or ttft_ms <= self.ttft_ms
        return is_first_in_time and (self.tpot_ms is None or tpot_ms is None or tpot_ms <= self.tpot_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Half of the values are not above `p50`, 95 of 100 not above `p95`."""

    p50: float
    p95: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedRequest:
    """A request that reached a replica and ended. Its account may still be open.

    `outcome` is a finish reason, `cancelled` (by its caller), or the name of a gRPC status.
    """

    request_id: str
    trace_id: str
    tenant: str
    model: str
    ended_s: float
    usage: Usage
    timing: Timing
    ttft_ms: float | None
    tpot_ms: float | None
    outcome: str
    account: EnergyAccount


@dataclass(frozen=True, slots=True)
class _Bill:
    settled_s: float
    energy_mj: int
    output_tokens: int
    total_tokens: int


class Answers:
    """The answers of one model: totals against its objective, and a window of the last ones."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.num_met = 0
        self.num_missed = 0
        self._closed: deque[ClosedRequest] = deque(maxlen=MAX_WINDOW)
        self._bills: deque[_Bill] = deque(maxlen=MAX_WINDOW)
        self._source = ""

    def add(self, closed: ClosedRequest) -> bool | None:
        """Returns whether it met the objective; None where there is none, or its caller gave it up."""
        self._closed.append(closed)
        if not self.objective.exists or closed.outcome == "cancelled":
            return None
        has_answer = closed.outcome in ("stop", "length")
        is_met = has_answer and self.objective.is_met(ttft_ms=closed.ttft_ms, tpot_ms=closed.tpot_ms)
        if is_met:
            self.num_met += 1
        else:
            self.num_missed += 1
        return is_met

    def add_bill(self, *, energy_mj: int, usage: Usage, source: str, now_s: float) -> None:
        """The settled joules of one request. Joules of another source start the window anew."""
        if source != self._source:
            self._bills.clear()
            self._source = source
        self._bills.append(
            _Bill(
                now_s,
                energy_mj,
                usage.completion_tokens,
                usage.prompt_tokens + usage.completion_tokens,
            )
        )

    def ttft_ms(self, *, now_s: float) -> Spread | None:
        """Of the answers that ended in the window. None: none did."""
        return spread([one.ttft_ms for one in self._recent(now_s) if one.ttft_ms is not None])

    def tpot_ms(self, *, now_s: float) -> Spread | None:
        return spread([one.tpot_ms for one in self._recent(now_s) if one.tpot_ms is not None])

    def joules_per_token(self, *, now_s: float) -> tuple[float | None, float | None]:
        """By output token and by total token: ratios of sums over the window. None: no token in it."""
        since_s = now_s - WINDOW_S
        bills = list(takewhile(lambda bill: bill.settled_s >= since_s, reversed(self._bills)))
        energy_j = sum(bill.energy_mj for bill in bills) / 1e3
        output_tokens = sum(bill.output_tokens for bill in bills)
        total_tokens = sum(bill.total_tokens for bill in bills)
        return (
            energy_j / output_tokens if output_tokens else None,
            energy_j / total_tokens if total_tokens else None,
        )

    def _recent(self, now_s: float) -> list[ClosedRequest]:
        since_s = now_s - WINDOW_S
        return list(takewhile(lambda one: one.ended_s >= since_s, reversed(self._closed)))


class Journal:
    """Mutable; owned by the event loop."""

    def __init__(self, objectives: Iterable[tuple[str, Objective]]) -> None:
        self._answers = {model: Answers(objective) for model, objective in objectives}
        self._last: deque[ClosedRequest] = deque(maxlen=LAST_REQUESTS)

    @property
    def last(self) -> Sequence[ClosedRequest]:
        """The requests that ended last, newest first."""
        return tuple(reversed(self._last))

    def of_model(self, model: str) -> Answers:
        return self._answers[model]

    def add(self, closed: ClosedRequest) -> bool | None:
        """Whether it met its model's objective; see `Answers.add`."""
        self._last.append(closed)
        return self._answers[closed.model].add(closed)


def spread(values: Iterable[float]) -> Spread | None:
    """By nearest rank, so both are values that occurred. None: there are no values.

    Example: of 1, 2, 3 and 4, half are not above 2, and 95 of 100 not above 4.
    """
    ordered = sorted(values)
    if not ordered:
        return None
    return Spread(p50=ordered[_rank(len(ordered), 50)], p95=ordered[_rank(len(ordered), 95)])


def _rank(num_values: int, percent: int) -> int:
    return max(0, -(-num_values * percent // 100) - 1)
