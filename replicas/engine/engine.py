"""The engine: requests in, one `step()` after another, tokens out.

Owns the steps under way and the time they took. What to compute is the scheduler's decision, computing it
is the runner's work; this file only joins them. Synchronous and single-threaded; driven by `rank/process.py`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from replicas.engine.load import LoadAverages
from replicas.engine.prefill_pace import PrefillPace
from replicas.engine.scheduled_step import ScheduledStep
from replicas.engine.scheduler import Scheduler
from replicas.logged_traces import list_traces
from replicas.plan import PendingStep, Runner, StepOutcome
from replicas.request import GenerationRequest, LoadSnapshot, StepRecord, StepResult, StepRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    """A step under way."""

    scheduled: ScheduledStep
    pending: PendingStep
    launched_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Landing:
    """A step that is done."""

    scheduled: ScheduledStep
    outcome: StepOutcome
    start_ns: int
    end_ns: int


class Engine:
    """A request that fails, fails alone, with an ERROR delta; an exception out of `step` ends the group.

    `lookahead` is how many steps are planned and launched before the oldest is waited for: with 1, the device
    has its next step queued while the tokens of the last are handled. `pace` None: prompts take what is free.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        lookahead: int = 0,
        pace: PrefillPace | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._lookahead = lookahead
        self._clock = clock
        self._flights: deque[_Flight] = deque()
        self._pace = pace
        self._averages = LoadAverages()
        self._landed_ns = 0

    @property
    def has_work(self) -> bool:
        """Whether a `step()` would give something."""
        return self._scheduler.has_work or bool(self._flights)

    @property
    def load(self) -> LoadSnapshot:
        averages = self._averages
        return self._scheduler.load(
            step_ms=averages.step_ms,
            prefill_tokens_per_s=averages.prefill_tokens_per_s,
            decode_tokens_per_s=averages.decode_tokens_per_s,
        )

    def submit(self, request: GenerationRequest) -> None:
        """Accept a request, or end it with an ERROR delta in the next result."""
        self._scheduler.submit(request, now_ns=self._clock())

    def cancel(self, request_id: int) -> None:
        """End a request with CANCELLED in the next result; no error if it has ended."""
        self._scheduler.cancel(request_id, now_ns=self._clock())

    def stop(self, request_id: int) -> None:
        """End a request with STOP in the next result; no error if it has ended."""
        self._scheduler.stop(request_id, now_ns=self._clock())

    def step(self) -> StepResult:
        self._schedule()
        landing = self._run()
        return self._commit(landing)

    def forget_averages(self) -> None:
        """Start the averages anew: a warm-up says nothing of the speed to come."""
        self._averages = LoadAverages()

    def _schedule(self) -> None:
        """Launch steps until one more than `lookahead` are under way, or nothing is left to plan."""
        while len(self._flights) <= self._lookahead:
            now_ns = self._clock()
            scheduled = self._scheduler.schedule(now_ns=now_ns, pace=self._pace)
            if scheduled is None:
                return
            try:
                pending = self._runner.launch(scheduled.plan)
            except Exception:
                _log_failure(scheduled)
                raise
            self._flights.append(_Flight(scheduled=scheduled, pending=pending, launched_ns=now_ns))

    def _run(self) -> _Landing | None:
        """Wait for the oldest step under way."""
        if not self._flights:
            assert self._scheduler.is_idle, "a live sequence can always be planned or is under way"
            return None
        flight = self._flights.popleft()
        try:
            outcome = flight.pending.result()
        except Exception:
            _log_failure(flight.scheduled)
            raise
        # A step launched early begins when the one before it ends.
        start_ns = max(flight.launched_ns, self._landed_ns)
        self._landed_ns = self._clock()
        return _Landing(
            scheduled=flight.scheduled, outcome=outcome, start_ns=start_ns, end_ns=self._landed_ns
        )

    def _commit(self, landing: _Landing | None) -> StepResult:
        record = None
        if landing is not None:
            members = self._scheduler.commit(landing.scheduled, landing.outcome, now_ns=landing.end_ns)
            record = StepRecord(
                step=landing.scheduled.plan.step,
                start_ns=landing.start_ns,
                end_ns=landing.end_ns,
                rows=StepRows.of(members),
                experts_hit=landing.outcome.experts_hit,
            )
            self._averages.observe(record)
            if self._pace is not None:
                self._pace.observe(record, num_prefilling=self._scheduler.num_prefilling)
        if self._scheduler.is_idle:
            self._scheduler.check_idle()
        return StepResult(
            step=self._scheduler.step if record is None else record.step,
            deltas=self._scheduler.take_deltas(),
            load=self.load,
            record=record,
            cache=self._scheduler.take_cache_changes(),
        )


def _log_failure(step: ScheduledStep) -> None:
    """Last words: an exception out of a step ends the group, and what was in the step may be the cause."""
    traces = list_traces(row.sequence.request.trace_id for row in reversed(step.rows))
    logger.error("step_failed step=%d sequences=%d traces=%s", step.plan.step, len(step.rows), traces)
