"""The energy side of a supervisor: feeds the step ledger and keeps what is published of it.

Sums per source: when a meter changes its kind (a counter is lost and power is integrated instead), the new
joules get a series of their own. Pure but for the clock it is given; one supervisor owns it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from replicas.energy.bill import RequestJoules
from replicas.energy.learning import LearnedFactors
from replicas.energy.ledger import Ledger
from replicas.energy.meter import Reading, Source
from replicas.energy.payers import PayerSums
from replicas.step_report import StepReport

POWER_TIME_CONSTANT_S = 1.0
COST_WINDOW_NS = 1_000_000_000
"""The joules per token are averaged over windows at least this wide."""
COST_WEIGHT = 0.3
MIN_BUSY_SHARE = 0.2
"""Of a window; with fewer steps in it, what they draw is lost in what is drawn anyway."""

Clock = Callable[[], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergySums:
    """Closed windows of one source: `request_mj + idle_mj + unattributed_mj == meter_mj`.

    `prefill_mj`, `static_mj` and `wasted_mj` are parts of `request_mj`. `host_meter_mj` is what the host drew
    beside the meter, `host_requests_mj` the requests' part of it; 0 where the host is not metered.
    """

    request_mj: int = 0
    idle_mj: int = 0
    unattributed_mj: int = 0
    meter_mj: int = 0
    prefill_mj: int = 0
    static_mj: int = 0
    wasted_mj: int = 0
    host_meter_mj: int = 0
    host_requests_mj: int = 0
    payers: Mapping[str, PayerSums] = field(default_factory=dict)
    """Of `request_mj`, by who pays."""

    @property
    def decode_mj(self) -> int:
        return self.request_mj - self.prefill_mj

    def _payer(self, name: str) -> PayerSums:
        return self.payers.get(name, PayerSums())

    def __add__(self, other: EnergySums) -> EnergySums:
        return self._plus(other, sign=1)

    def __sub__(self, other: EnergySums) -> EnergySums:
        return self._plus(other, sign=-1)

    def _plus(self, other: EnergySums, *, sign: int) -> EnergySums:
        return EnergySums(
            request_mj=self.request_mj + sign * other.request_mj,
            idle_mj=self.idle_mj + sign * other.idle_mj,
            unattributed_mj=self.unattributed_mj + sign * other.unattributed_mj,
            meter_mj=self.meter_mj + sign * other.meter_mj,
            prefill_mj=self.prefill_mj + sign * other.prefill_mj,
            static_mj=self.static_mj + sign * other.static_mj,
            wasted_mj=self.wasted_mj + sign * other.wasted_mj,
            host_meter_mj=self.host_meter_mj + sign * other.host_meter_mj,
            host_requests_mj=self.host_requests_mj + sign * other.host_requests_mj,
            payers={
                name: self._payer(name).plus(other._payer(name), sign=sign)
                for name in {**self.payers, **other.payers}
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyQuality:
    """How far the division of the meter is to be believed; the meter's total does not depend on it.

    `calibration_ratio` is modelled by metered energy over the last windows; None while nothing was learned.
    `num_low_confidence` counts bills of requests whose steps the meter did not see all of.
    """

    calibration_ratio: float | None
    is_learned: bool
    num_low_confidence: int
    unattributed_share: float


class EnergyAccount:
    """Steps and meter readings in, bills and rates out.

    `power_w` and `joules_per_token` (request energy by generated token) are running averages; None until
    the meter spoke. `idle_power_w` and `active_power_w` are the devices' without and with a step under way;
    None until both kinds of time were seen. All calls are cheap enough for the step path.
    """

    def __init__(self, ledger: Ledger, *, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._last_reading: Reading | None = None
        self._past: dict[Source, EnergySums] = {}
        """Of the sources before the present one, and of itself where it was one of them."""
        self._num_past_windows = 0
        self._generated_tokens = 0
        self._cost_since: tuple[int, int, int] | None = None
        self._busy_ns = 0
        self._power_since: tuple[int, int, int] | None = None
        self.agent_metrics_addresses: tuple[str, ...] = ()
        """Of those who read the meter; told with the sums."""
        self.power_w: float | None = None
        self.joules_per_token: float | None = None
        self.idle_power_w: float | None = None
        self.active_power_w: float | None = None

    @property
    def source(self) -> Source | None:
        """Of the newest reading."""
        return None if self._last_reading is None else self._last_reading.source

    @property
    def sums(self) -> dict[Source, EnergySums]:
        """By source; over all sources it equals the ledger's totals. Added up when asked for."""
        source = self.source
        if source is None or self._ledger.num_windows == self._num_past_windows:
            return dict(self._past)
        new = self._divided() - sum(self._past.values(), EnergySums())
        return {**self._past, source: self._past.get(source, EnergySums()) + new}

    @property
    def divided_until_ns(self) -> int:
        """Up to here the meter's energy is in `sums`, on the host's monotonic clock; 0: there is none."""
        return self._ledger.totals().closed_until_ns if self._ledger.num_windows else 0

    @property
    def quality(self) -> EnergyQuality | None:
        """None until the meter counted anything."""
        totals, learner = self._ledger.totals(), self._ledger.learner
        if not totals.meter_mj:
            return None
        return EnergyQuality(
            calibration_ratio=learner.ratio if learner else None,
            is_learned=learner is not None and learner.is_trusted,
            num_low_confidence=totals.low_confidence,
            unattributed_share=totals.unattributed_mj / totals.meter_mj,
        )

    @property
    def learned(self) -> LearnedFactors | None:
        """What the next life of this group can go on from; None if nothing is learned here."""
        return self._ledger.learner.known if self._ledger.learner else None

    def begin(self, engine_id: int, *, payer: str = "") -> None:
        """A request went down to the engine."""
        self._ledger.begin_request(engine_id, payer)

    def add_step(self, report: StepReport) -> None:
        """A step came up, with the requests it ended."""
        if report.record is not None:
            self._ledger.add_step(report.record)
            self._busy_ns += report.record.end_ns - report.record.start_ns
        self._generated_tokens += report.num_tokens
        now_ns = self._clock()
        for delta in report.deltas:
            if delta.finish is not None:
                self._ledger.end_request(delta.request_id, now_ns)
        self._ledger.advance(now_ns)

    def add_reading(self, reading: Reading) -> None:
        last = self._last_reading
        if last is not None and reading.source is not last.source:
            self._past, self._num_past_windows = self.sums, self._ledger.num_windows
        self._last_reading = reading
        if reading.gap:
            self._power_since = None
        self._ledger.add_reading(reading)
        self._ledger.advance(self._clock())
        if last is not None and reading.t_ns > last.t_ns and not reading.gap:
            self._note_power(last, reading)

    def tick(self) -> None:
        """Time passed. Call it several times a second, also when nothing runs."""
        self._ledger.advance(self._clock())
        self._note_cost()
        self._note_active_power()

    def provisional(self, engine_id: int) -> RequestJoules | None:
        """What is known of a request now; None if nothing is."""
        return self._ledger.provisional(engine_id)

    def take_closed(self) -> list[RequestJoules]:
        """Final bills since the last call."""
        return self._ledger.take_closed()

    def take_unmeasured(self) -> list[int]:
        """Requests whose energy will never be known."""
        return self._ledger.take_unmeasured()

    def _divided(self) -> EnergySums:
        """Of all sources."""
        totals, host = self._ledger.totals(), self._ledger.host_totals()
        return EnergySums(
            request_mj=totals.requests_mj,
            idle_mj=totals.idle_mj,
            unattributed_mj=totals.unattributed_mj,
            meter_mj=totals.meter_mj,
            prefill_mj=totals.prefill_mj,
            static_mj=totals.static_mj,
            wasted_mj=totals.wasted_mj,
            host_meter_mj=host.meter_mj,
            host_requests_mj=host.requests_mj,
            payers=self._ledger.payers,
        )

    def _note_power(self, last: Reading, reading: Reading) -> None:
        seconds = (reading.t_ns - last.t_ns) / 1e9
        power_w = (reading.energy_mj - last.energy_mj) / 1e3 / seconds
        keep = math.exp(-seconds / POWER_TIME_CONSTANT_S)
        self.power_w = power_w if self.power_w is None else keep * self.power_w + (1.0 - keep) * power_w

    def _note_active_power(self) -> None:
        """The meter's energy of a window, less what was drawn between its steps, by the time of these."""
        self.idle_power_w = self._ledger.warm_power_w
        if self._last_reading is None or self.idle_power_w is None:
            return
        now_ns, energy_mj = self._last_reading.t_ns, self._last_reading.energy_mj
        since = self._power_since or (now_ns, energy_mj, self._busy_ns)
        self._power_since = since
        window_ns, busy_ns = now_ns - since[0], self._busy_ns - since[2]
        if window_ns < COST_WINDOW_NS:
            return
        self._power_since = (now_ns, energy_mj, self._busy_ns)
        busy_ns = min(busy_ns, window_ns)
        if busy_ns < MIN_BUSY_SHARE * window_ns:
            return
        idle_j = self.idle_power_w * (window_ns - busy_ns) / 1e9
        active_w = max(self.idle_power_w, ((energy_mj - since[1]) / 1e3 - idle_j) / (busy_ns / 1e9))
        last_w = self.active_power_w
        self.active_power_w = active_w if last_w is None else last_w + COST_WEIGHT * (active_w - last_w)

    def _note_cost(self) -> None:
        """Request energy by generated token since the last window. A window without tokens says nothing."""
        now_ns, since = self._clock(), self._cost_since
        if since is not None and (now_ns - since[0] < COST_WINDOW_NS or self._last_reading is None):
            return
        request_mj = self._ledger.totals().requests_mj
        self._cost_since = (now_ns, request_mj, self._generated_tokens)
        num_tokens = self._generated_tokens - since[2] if since else 0
        if since is None or num_tokens == 0:
            return
        cost_j = (request_mj - since[1]) / 1e3 / num_tokens
        last_j = self.joules_per_token
        self.joules_per_token = cost_j if last_j is None else last_j + COST_WEIGHT * (cost_j - last_j)
