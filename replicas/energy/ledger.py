"""The step ledger: every millijoule the meter counts goes to a request, to idle, or to unattributed. Exactly.

Two streams come in, in any interleaving: meter readings, which cut time into windows, and step records, which
say who ran when. A window is divided once all its steps are in (`advance`); the sums are integers, and
`requests + idle + unattributed == meter` is asserted at each reading. Pure: no clock, no I/O; one owner calls
it from one thread. The supervisor feeds it:

    ledger.begin_request(id)            when a request goes down to the engine
    ledger.add_step(record)             for each step record that comes up
    ledger.end_request(id, now_ns)      after its last delta and the record of its last step
    ledger.add_reading(reading)         for each meter edge
    ledger.advance(now_ns)              after each of these, and on a timer
    ledger.take_closed()                final joules, within one meter window of the last step
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from replicas.energy.account_book import AccountBook
from replicas.energy.accounts import Account
from replicas.energy.bill import METHOD, Cashier, RequestJoules, bill_of
from replicas.energy.claims import ENDED_NS, PREFILL, WEIGHT, Claims, claims_of
from replicas.energy.host_share import HostTotals
from replicas.energy.learning import CoefficientLearner
from replicas.energy.meter import Reading
from replicas.energy.payers import NJ_PER_MJ, PayerSums
from replicas.energy.warm_power import PJ_PER_MJ, WarmPower
from replicas.energy.weights import GPU_COEFFICIENTS, DeviceCoefficients, MemberCosts
from replicas.energy.window import Share, Step, Window, partition, window_between
from replicas.request import EngineCosts, StepRecord

__all__ = ["METHOD", "Ledger", "LedgerLimits", "LedgerTotals", "RequestJoules"]

_STEPS_ESTIMATED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLimits:
    """Bounds of what a ledger retains. What falls out is counted, and its energy is unattributed.

    `patience_ms` is how long a window waits for the end of a step that still runs.
    """

    open_windows: int = 2048
    open_steps: int = 16_384
    requests: int = 16_384
    results: int = 16_384
    payers: int = 32
    patience_ms: float = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerTotals:
    """Sums over all closed windows: `requests_mj + idle_mj + unattributed_mj == meter_mj`.

    `prefill_mj`, `static_mj` and `wasted_mj` are parts of `requests_mj`; what is not prefill is decode.
    `billed_mj` is the part of `requests_mj` on final bills; the rest belongs to requests still open.
    `pending_mj` was counted by the meter in windows not closed yet. `low_confidence` counts bills of requests
    whose steps were not all inside billed windows. `warm_power_w` is None while no idle window was seen.
    """

    meter_mj: int
    requests_mj: int
    idle_mj: int
    unattributed_mj: int
    billed_mj: int
    pending_mj: int
    prefill_mj: int
    static_mj: int
    wasted_mj: int
    closed_until_ns: int
    closed_windows: int
    low_confidence: int
    unmeasured: int
    late_steps: int
    dropped_steps: int
    dropped_readings: int
    warm_power_w: float | None


class Ledger:
    """Divides a meter among requests. See the module docstring for the calls; all of them are cheap."""

    def __init__(
        self,
        *,
        costs: EngineCosts,
        idle_power_w: float | None = None,
        coefficients: DeviceCoefficients = GPU_COEFFICIENTS,
        learner: CoefficientLearner | None = None,
        lookahead: int = 0,
        limits: LedgerLimits | None = None,
    ) -> None:
        """`idle_power_w`: what the devices draw while no step runs, if known; else it is measured.

        `learner`: corrects `coefficients` by the meter; None: they stay as they are. `lookahead`: steps the
        engine launches ahead; as many may land after a request has ended.
        """
        self._costs = MemberCosts(costs)
        self._coefficients = coefficients
        self._learner = learner
        self._lookahead = lookahead
        self._limits = limits or LedgerLimits()
        self._cashier = Cashier(most_payers=self._limits.payers)
        self._patience_ns = round(self._limits.patience_ms * 1e6)
        self._warm = WarmPower(told_w=idle_power_w)
        self._book = AccountBook(
            self._cashier, max_requests=self._limits.requests, max_results=self._limits.results
        )
        self._steps: list[Step] = []
        self._lost: list[tuple[int, int]] = []
        self._windows: deque[Window] = deque()
        self._last_reading: Reading | None = None
        self._owes_gap = False
        self._last_step: Step | None = None
        self._newest_step_end_ns = 0
        self._overrun_ns = 0
        self._watermark_ns = 0
        self._closed_until_ns = 0
        self._idle_carry_pj = 0
        self._seen_mj = self._meter_mj = self._idle_mj = self._unattributed_mj = self._pending_mj = 0
        self.num_windows = 0
        self._num_late_steps = self._num_dropped_steps = self._num_dropped_readings = 0

    def begin_request(self, request_id: int, payer: str = "") -> None:
        """The engine may run steps for this request from now on. Optional: its first step says the same."""
        self._book.begin(request_id, payer)

    def add_step(self, record: StepRecord) -> None:
        """One forward pass. They may come late and out of order, but before `advance` passes them.

        Numbers count up by one; a missing one is a lost record, whose windows go to unattributed.
        """
        start_ns, end_ns = record.start_ns, record.end_ns
        assert end_ns >= start_ns, f"step {record.step} ends before it starts"
        if not len(record.rows):
            return
        step = Step(start_ns, end_ns, record.step, record.rows, record.experts_hit)
        is_newest = not self._steps or start_ns >= self._steps[-1].start_ns
        self._book.start(step, is_newest=is_newest)
        if end_ns > self._newest_step_end_ns:
            self._newest_step_end_ns = end_ns
        if self._last_reading is not None and start_ns < self._closed_until_ns:
            self._num_late_steps += 1
            if end_ns <= self._closed_until_ns:
                self._book.miss(step)
                self._note_passed(step)
                return
        if is_newest:
            self._steps.append(step)
        else:
            insort(self._steps, step, key=attrgetter("start_ns"))
        if len(self._steps) > self._limits.open_steps:
            self._drop_oldest_step()

    def lose_steps(self, *, start_ns: int, end_ns: int) -> None:
        """Steps ran in this time whose records will never come. Its windows go to unattributed."""
        if end_ns <= max(start_ns, self._closed_until_ns):
            return
        if len(self._lost) >= self._limits.open_windows:
            (start_a, end_a), (start_b, end_b) = self._lost[0], self._lost.pop(1)
            self._lost[0] = (min(start_a, start_b), max(end_a, end_b))
        self._lost.append((start_ns, end_ns))

    def add_reading(self, reading: Reading) -> None:
        """The meter at a later instant. The first only starts the count; of an older one its gap remains."""
        last = self._last_reading
        if last is not None and reading.t_ns <= last.t_ns:
            self._num_dropped_readings += 1
            self._owes_gap = self._owes_gap or reading.gap
            return
        if self._owes_gap:
            reading, self._owes_gap = replace(reading, gap=True), False
        self._last_reading = reading
        self._book.source = reading.source
        self._cashier.host.add_reading(reading)
        if last is None:
            self._closed_until_ns = reading.t_ns
            return
        window = window_between(last, reading)
        self._windows.append(window)
        self._pending_mj += window.delta_mj
        self._seen_mj += window.delta_mj
        if len(self._windows) > self._limits.open_windows:
            self._close(self._windows.popleft(), is_known=False)
        self._close_settled()
        self._check()

    def advance(self, t_ns: int) -> None:
        """Every step that ended before `t_ns` has been added; closes the windows this completes.

        While a request is live the next step may be running already, so windows then wait for the newest
        step's end to pass theirs, at most `patience_ms`. Call it with the time now, also when nothing runs.
        """
        if t_ns > self._watermark_ns:
            self._watermark_ns = t_ns
            self._close_settled()

    def end_request(self, request_id: int, end_ns: int) -> None:
        """No step after `end_ns` names this request; final once the windows up to then are closed.

        One that never ran is billed a measured 0. A step launched ahead may land later: its energy is on the
        same bill, or on a second one of the same id if the first is final, which then adds to it.
        """
        account = self._book.account(request_id)
        account.last_ns = max(account.last_ns, end_ns, self._last_step_end_ns(request_id, after_ns=end_ns))
        if self._lookahead and self._steps:
            step_ns = self._steps[-1].duration_ns
            self._overrun_ns = max(self._overrun_ns, account.last_ns + 2 * self._lookahead * step_ns)
        self._book.end(account)
        self._book.settle(self._closed_until_ns)

    def provisional(self, request_id: int) -> RequestJoules | None:
        """What is known now, with an estimate for windows still open. None: unknown, or already final."""
        account = self._book.accounts.get(request_id)
        if account is None or self._last_reading is None:
            return None
        price = self._cashier.nj_per_weight
        open_prefill, open_decode = self._open_weights(account)
        if price is None and (open_prefill or open_decode):
            return None
        held = self._cashier.accounts.held(account)
        if not held.is_measured and not (open_prefill or open_decode):
            return None
        open_prefill_nj, open_decode_nj = open_prefill * (price or 0.0), open_decode * (price or 0.0)
        return bill_of(
            account,
            held,
            self._cashier.accounts,
            total_mj=round((held.total_nj + open_prefill_nj + open_decode_nj) / NJ_PER_MJ),
            source=self._last_reading.source,
            final=False,
            open_prefill_nj=open_prefill_nj,
            open_decode_nj=open_decode_nj,
        )

    def take_closed(self) -> list[RequestJoules]:
        """Final bills since the last call, oldest first."""
        return self._book.take_closed()

    def take_unmeasured(self) -> list[int]:
        """Ended requests whose energy stays unknown: the meter was not counting while their steps ran."""
        return self._book.take_unmeasured()

    @property
    def payers(self) -> dict[str, PayerSums]:
        """Who took the energy of requests so far: sums of prefill and decode over payers are the totals'."""
        return self._cashier.payers.sums

    @property
    def learner(self) -> CoefficientLearner | None:
        return self._learner

    @property
    def warm_power_w(self) -> float | None:
        """As in `totals`, which are dearer."""
        return self._warm.power_w

    def host_totals(self) -> HostTotals:
        """What the host drew beside the devices; no part of `totals`."""
        return self._cashier.host.totals(self._closed_until_ns)

    def totals(self) -> LedgerTotals:
        return LedgerTotals(
            meter_mj=self._meter_mj,
            requests_mj=self._cashier.taken_mj,
            idle_mj=self._idle_mj,
            unattributed_mj=self._unattributed_mj,
            billed_mj=self._cashier.billed_mj,
            pending_mj=self._pending_mj,
            prefill_mj=self._cashier.prefill_mj,
            static_mj=self._cashier.static_nj // NJ_PER_MJ,
            wasted_mj=self._cashier.wasted_nj // NJ_PER_MJ,
            closed_until_ns=self._closed_until_ns,
            closed_windows=self.num_windows,
            low_confidence=self._book.num_low_confidence,
            unmeasured=self._book.num_unmeasured,
            late_steps=self._num_late_steps,
            dropped_steps=self._num_dropped_steps,
            dropped_readings=self._num_dropped_readings,
            warm_power_w=self._warm.power_w,
        )

    # Windows.

    def _close_settled(self) -> None:
        settled_ns = self._watermark_ns
        if self._book.has_live or settled_ns < self._overrun_ns:
            settled_ns = min(settled_ns, max(self._newest_step_end_ns, settled_ns - self._patience_ns))
        if not self._windows or self._windows[0].end_ns > settled_ns:
            return
        while self._windows and self._windows[0].end_ns <= settled_ns:
            self._close(self._windows.popleft(), is_known=True)
        self._book.settle(self._closed_until_ns)

    def _close(self, window: Window, *, is_known: bool) -> None:
        """Divide one window. Not `is_known`: it was closed for want of room, before its steps were in."""
        part = partition(window, self._steps, before=self._last_step, is_continued=self._book.is_continued)
        lost_ns = sum(window.overlap_ns(start_ns, end_ns) for start_ns, end_ns in self._lost)
        claims = self._claims(part.shares) if part.shares else None
        if claims is not None:
            self._cashier.accounts.add_steps(claims.table[ENDED_NS].astype(np.int64))
        for share in part.shares:
            share.step.is_seen = True
        idle_mj = unattributed_mj = 0
        if window.gap or not is_known:
            unattributed_mj = window.delta_mj
        elif part.idle_ns == window.width_ns and not lost_ns:
            idle_mj = window.delta_mj
            self._warm.observe_idle(window)
        else:
            idle_mj = self._idle_part_mj(window, max(0, part.idle_ns - lost_ns))
            busy_mj = window.delta_mj - idle_mj
            if part.hole_ns or lost_ns or claims is None or not self._cashier.has_room(busy_mj):
                unattributed_mj = busy_mj
            else:
                static_nj = self._warm.drawn_pj(window, part.busy_ns) // 1000
                self._cashier.take(window, busy_mj=busy_mj, static_nj=static_nj, claims=claims)
                if self._learner is not None:
                    self._learner.observe(claims.work, busy_mj)
        self._idle_mj += idle_mj
        self._unattributed_mj += unattributed_mj
        self._meter_mj += window.delta_mj
        self._pending_mj -= window.delta_mj
        self.num_windows += 1
        self._pass(window.end_ns)

    def _claims(self, shares: Sequence[Share]) -> Claims:
        device = self._learner.coefficients if self._learner else self._coefficients
        places = [self._book.places(share.step) for share in shares]
        return claims_of(shares, self._costs, device, places=places)

    def _pass(self, t_ns: int) -> None:
        """All time up to `t_ns` is divided: let go of the steps that ended in it."""
        self._closed_until_ns = t_ns
        num_passed = 0
        for step in self._steps:
            if step.end_ns > t_ns:
                break
            num_passed += 1
            self._note_passed(step)
            if not step.is_seen:
                self._book.miss(step)
        del self._steps[:num_passed]
        if self._lost:
            self._lost = [span for span in self._lost if span[1] > t_ns]

    def _note_passed(self, step: Step) -> None:
        if self._last_step is None or step.end_ns >= self._last_step.end_ns:
            self._last_step = step

    def _idle_part_mj(self, window: Window, idle_ns: int) -> int:
        """What the idle time of a mixed window drew; fractions of a millijoule are carried on."""
        drawn_pj = self._warm.drawn_pj(window, idle_ns) + self._idle_carry_pj
        idle_mj = min(window.delta_mj, drawn_pj // PJ_PER_MJ)
        self._idle_carry_pj = min(drawn_pj - idle_mj * PJ_PER_MJ, PJ_PER_MJ - 1)
        return idle_mj

    # Requests.

    def _open_weights(self, account: Account) -> tuple[float, float]:
        """Prefill and decode weight of `account` in steps that are not fully billed, of the newest ones."""
        shares = [
            Share(step, max(0, step.end_ns - max(step.start_ns, self._closed_until_ns)), 0, 0)
            for step in self._steps[-_STEPS_ESTIMATED:]
            if account.request_id in step.rows.ids.tolist()
        ]
        if not shares:
            return 0.0, 0.0
        table = self._claims(shares).table
        prefill = float(table[PREFILL, account.row])
        return prefill, float(table[WEIGHT, account.row]) - prefill

    def _last_step_end_ns(self, request_id: int, *, after_ns: int) -> int:
        """The end of the newest open step with this request in it; 0 if none ends later than `after_ns`."""
        if self._newest_step_end_ns <= after_ns:
            return 0
        later = [step for step in self._steps if step.end_ns > after_ns]
        return max([step.end_ns for step in later if request_id in step.rows.ids.tolist()], default=0)

    def _drop_oldest_step(self) -> None:
        step = self._steps.pop(0)
        if not step.is_seen:
            self._book.miss(step)
        self._num_dropped_steps += 1
        self.lose_steps(start_ns=step.start_ns, end_ns=step.end_ns)

    def _check(self) -> None:
        """Joules in equal joules out, by two routes."""
        self._cashier.check()
        divided_mj = self._cashier.taken_mj + self._idle_mj + self._unattributed_mj
        assert divided_mj == self._meter_mj, f"{divided_mj} mJ divided of {self._meter_mj} mJ metered"
        assert self._meter_mj + self._pending_mj == self._seen_mj
