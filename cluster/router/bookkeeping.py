"""Closes the books of a request when its tokens have ended: usage, timing, metrics, span, energy record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic, time

from cluster.energy.account import EnergyAccount, joined, summed
from cluster.ledger.recorder import LedgerRecorder
from cluster.request.answer import Timing, Usage, join_timing, sum_usage
from cluster.request.errors import (
    DeadlinePassed,
    InvalidRequest,
    LimitReached,
    NoReplica,
    Quarantined,
    ReplicaStopped,
    ResumeRefused,
    RouterError,
    status_of,
)
from cluster.router.energy_record import EnergyRecord, FinishedRequest
from cluster.router.ledger_entries import entry_of
from cluster.router.run import Run
from cluster.router.story import story_of, story_of_unserved
from cluster.router.story_record import StoryRecord
from cluster.router.way_in import WayIn
from cluster.served_model import ServedModel
from cluster.telemetry.journal import ClosedRequest, Journal
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import Telemetry
from replicas.request import FinishReason

REFUSALS: dict[type[RouterError], str] = {
    LimitReached: "tenant_limit",
    NoReplica: "no_replica",
    ReplicaStopped: "no_replica",
    DeadlinePassed: "deadline",
    Quarantined: "quarantined",
    ResumeRefused: "resume_refused",
    InvalidRequest: "invalid",
}
"""Labels of those that are not about load. A request is invalid here by what its tokens tell."""
CANCELLED = "cancelled"
"""The outcome of what its caller gave up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedBooks:
    """What a request, or one choice of it, took. Its joules may still be open."""

    usage: Usage
    timing: Timing
    account: EnergyAccount


class Books:
    """Where all that is remembered of a request goes."""

    def __init__(
        self,
        *,
        record: EnergyRecord,
        journal: Journal,
        stories: StoryRecord,
        metrics: RouterMetrics,
        telemetry: Telemetry,
        ledger: LedgerRecorder | None,
        clock_s: Callable[[], float] = monotonic,
    ) -> None:
        """`ledger` None: what requests cost is forgotten with this process."""
        self._ledger = ledger
        self._record = record
        self._journal = journal
        self._stories = stories
        self._metrics = metrics
        self._telemetry = telemetry
        self._clock_s = clock_s

    def count_admission(self, model: ServedModel, *, tenant: str) -> None:
        """This or `count_unserved` is called once for each request that arrives; `tenant` is a label."""
        self._metrics.count_admission(model.name, tenant, "admitted")

    def count_unserved(self, way_in: WayIn, end: RouterError | None, *, tenant: str) -> None:
        """Count a request that no replica had, and remember it for `wattline why`.

        `end` None: its caller gave it up, so that it was not refused.
        """
        model = way_in.model
        outcome = CANCELLED if end is None else REFUSALS.get(type(end), "overloaded")
        self._metrics.count_admission(model.name, tenant, outcome)
        if end is not None:
            model.refused_total += 1
            self._metrics.observe_refusal(model.name, self._clock_s() - way_in.caller.arrived_s)
        status = None if end is None else status_of(end)
        self._stories.add(
            story_of_unserved(
                way_in,
                now_s=self._clock_s(),
                outcome=CANCELLED if status is None else status.code.name,
                refusal="its caller gave it up before a replica had it" if status is None else status.message,
            )
        )

    def close(self, runs: Sequence[Run]) -> ClosedBooks:
        """Called once per request, however it ended, with its choices that were begun.

        Its joules follow when its account is settled.
        """
        choices = [self._close_choice(run) for run in runs]
        whole = ClosedBooks(
            usage=sum_usage([choice.usage for choice in choices]),
            timing=join_timing([choice.timing for choice in choices]),
            account=summed([choice.account for choice in choices]),
        )
        first = runs[0]
        model = first.model
        model.prompt_tokens_total += whole.usage.prompt_tokens
        model.output_tokens_total += whole.usage.completion_tokens
        self._metrics.count_tokens(model.name, whole.usage)
        closed = _closed(runs, whole, now_s=self._clock_s())
        is_met = self._journal.add(closed)
        self._stories.add(story_of(runs, closed))
        self._metrics.observe_request(closed, is_met=is_met)
        self._record.add(
            FinishedRequest(
                request_id=first.request_id, model=model.name, usage=whole.usage, account=whole.account
            )
        )
        whole.account.when_settled(partial(self._add_bill, model, whole))
        if self._ledger is not None:
            whole.account.when_settled(partial(self._send_to_ledger, self._ledger, closed, time()))
        return whole

    def _close_choice(self, run: Run) -> ClosedBooks:
        """Its span ends now; the energy metric takes each attempt by itself as it settles.

        Measured and estimated joules share no series.
        """
        usage = _usage(run)
        if isinstance(run.outcome, FinishReason):
            run.model.output_estimate.add(usage.completion_tokens)
        account = joined(
            [attempt.account for attempt in run.attempts],
            repeated=[attempt.is_repeated for attempt in run.attempts],
        )
        run.span.finish(
            replica_id=run.attempt.connection.replica_id,
            epoch=run.attempt.connection.epoch,
            usage=usage,
            timing=run.attempt.timing,
            resumed_at=run.resumed_at,
            outcome=run.outcome,
        )
        self._telemetry.hold_for_energy(run.span, account, run.model.ledger.idle_share)
        for attempt in run.attempts:
            attempt.account.when_settled(partial(self._count_energy, run.model, attempt.account))
        return ClosedBooks(usage=usage, timing=_timing(run, now_s=self._clock_s()), account=account)

    def _count_energy(self, model: ServedModel, account: EnergyAccount) -> None:
        if account.energy is not None:
            self._metrics.add_energy(model.name, account.energy)

    def _send_to_ledger(self, ledger: LedgerRecorder, closed: ClosedRequest, ended_s: float) -> None:
        ledger.add(entry_of(closed, ended_s=ended_s))

    def _add_bill(self, model: ServedModel, whole: ClosedBooks) -> None:
        energy = whole.account.energy
        if energy is None:
            return
        model.add_energy(energy, output_tokens=whole.usage.completion_tokens)
        self._journal.of_model(model.name).add_bill(
            energy_mj=energy.total_mj, usage=whole.usage, source=energy.source, now_s=self._clock_s()
        )


def _closed(runs: Sequence[Run], whole: ClosedBooks, *, now_s: float) -> ClosedRequest:
    """The first token is the earliest of all choices; the pace is that of the slowest."""
    first = runs[0]
    return ClosedRequest(
        request_id=first.request_id,
        trace_id=first.span.trace_id,
        tenant=first.tenant,
        model=first.model.name,
        ended_s=now_s,
        usage=whole.usage,
        timing=whole.timing,
        ttft_ms=None if first.first_token_s is None else whole.timing.ttft_ms,
        tpot_ms=max((pace for run in runs if (pace := _tpot_ms(run)) is not None), default=None),
        outcome=_outcome([run.outcome for run in runs]),
        account=whole.account,
    )


def _tpot_ms(run: Run) -> float | None:
    first_s, last_s = run.first_token_s, run.last_token_s
    if first_s is None or last_s is None or len(run.delivered_ids) < 2:
        return None
    return (last_s - first_s) * 1e3 / (len(run.delivered_ids) - 1)


def _outcome(outcomes: Sequence[FinishReason | RouterError | None]) -> str:
    """One of a few words: it becomes a label. Of several choices, how the first failed, or else finished."""
    for outcome in outcomes:
        if isinstance(outcome, RouterError):
            return status_of(outcome).code.name
        if outcome is None:
            return CANCELLED
    assert isinstance(outcomes[0], FinishReason)
    return outcomes[0].name.lower()


def _usage(run: Run) -> Usage:
    """Cached is what the first attempt found: a later one finds what was paid for already.

    Of the caller's own prompt: that of an answer that goes on here has what was delivered before, too.
    """
    first, prompt_tokens = run.attempts[0].timing, len(run.job.prompt_ids)
    return Usage(
        prompt_tokens=prompt_tokens,
        cached_tokens=min(first.cached_tokens, prompt_tokens) if first else 0,
        completion_tokens=len(run.delivered_ids),
        wasted_tokens=sum(attempt.wasted_tokens for attempt in run.attempts),
    )


def _timing(run: Run, *, now_s: float) -> Timing:
    """The engine's part is that of the last attempt: a replica that is lost says nothing of its own."""
    engine = run.attempt.timing
    first_s = run.first_token_s
    return Timing(
        queue_ms=run.way_in.queued_s * 1e3 + (engine.queue_us / 1e3 if engine else 0.0),
        prefill_ms=engine.prefill_us / 1e3 if engine else 0.0,
        decode_ms=engine.decode_us / 1e3 if engine else 0.0,
        ttft_ms=(first_s - run.arrived_s) * 1e3 if first_s is not None else 0.0,
        total_ms=(now_s - run.arrived_s) * 1e3,
    )
