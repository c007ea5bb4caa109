"""Closes the books of a request when its tokens have ended: usage, timing, metrics, span, energy record."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from time import monotonic

from cluster.router.answer import Timing, Usage
from cluster.router.energy_account import EnergyAccount, joined
from cluster.router.energy_record import EnergyRecord, FinishedRequest
from cluster.router.errors import RouterError, status_of
from cluster.router.journal import ClosedRequest, Journal
from cluster.router.run import Run
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import Telemetry
from replicas.request import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedBooks:
    """What a request took. Its joules may still be open."""

    usage: Usage
    timing: Timing
    account: EnergyAccount


class Books:
    """Where all that is remembered of a request goes."""

    def __init__(
        self, *, record: EnergyRecord, journal: Journal, metrics: RouterMetrics, telemetry: Telemetry
    ) -> None:
        self._record = record
        self._journal = journal
        self._metrics = metrics
        self._telemetry = telemetry

    def close(self, run: Run) -> ClosedBooks:
        """Called once per request, however it ended. Its joules follow when its account is settled."""
        usage, timing = _usage(run), _timing(run)
        account = joined(
            [attempt.account for attempt in run.attempts],
            repeated=[attempt.is_repeated for attempt in run.attempts],
        )
        model = run.model
        model.prompt_tokens_total += usage.prompt_tokens
        model.output_tokens_total += usage.completion_tokens
        if isinstance(run.outcome, FinishReason):
            model.output_estimate.add(usage.completion_tokens)
        self._metrics.count_tokens(model.name, usage)
        closed = _closed(run, usage, timing, account)
        is_met = self._journal.add(closed)
        self._metrics.observe_request(closed, is_met=is_met)
        self._record.add(
            FinishedRequest(request_id=run.request_id, model=model.name, usage=usage, account=account)
        )
        run.span.finish(
            replica_id=run.attempt.connection.replica_id,
            usage=usage,
            timing=run.attempt.timing,
            resumed_at=run.resumed_at,
            outcome=run.outcome,
        )
        self._telemetry.hold_for_energy(run.span, account)
        self._book_energy(run, account, usage)
        return ClosedBooks(usage=usage, timing=timing, account=account)

    def _book_energy(self, run: Run, whole: EnergyAccount, usage: Usage) -> None:
        """The metric takes each attempt by itself: measured and estimated joules share no series."""

        def count(account: EnergyAccount) -> None:
            if account.energy is not None:
                self._metrics.add_energy(run.model.name, account.energy)

        def settled() -> None:
            if whole.energy is not None:
                run.model.add_energy(whole.energy, output_tokens=usage.completion_tokens)
                self._journal.of_model(run.model.name).add_bill(
                    energy_mj=whole.energy.total_mj,
                    usage=usage,
                    source=whole.energy.source,
                    now_s=monotonic(),
                )

        for attempt in run.attempts:
            attempt.account.when_settled(partial(count, attempt.account))
        whole.when_settled(settled)


def _closed(run: Run, usage: Usage, timing: Timing, account: EnergyAccount) -> ClosedRequest:
    first_s, last_s = run.first_token_s, run.last_token_s
    tpot_ms = None
    if first_s is not None and last_s is not None and usage.completion_tokens > 1:
        tpot_ms = (last_s - first_s) * 1e3 / (usage.completion_tokens - 1)
    return ClosedRequest(
        request_id=run.request_id,
        trace_id=run.span.trace_id,
        model=run.model.name,
        ended_s=monotonic(),
        usage=usage,
        timing=timing,
        ttft_ms=None if first_s is None else timing.ttft_ms,
        tpot_ms=tpot_ms,
        outcome=_outcome(run.outcome),
        account=account,
    )


def _outcome(outcome: FinishReason | RouterError | None) -> str:
    """One of a few words: it becomes a label."""
    if outcome is None:
        return "cancelled"
    return outcome.name.lower() if isinstance(outcome, FinishReason) else status_of(outcome).code.name


def _usage(run: Run) -> Usage:
    """Cached is what the first attempt found: a later one finds what was paid for already."""
    first = run.attempts[0].timing
    return Usage(
        prompt_tokens=len(run.job.prompt_ids),
        cached_tokens=first.cached_tokens if first else 0,
        completion_tokens=len(run.delivered_ids),
        wasted_tokens=sum(attempt.wasted_tokens for attempt in run.attempts),
    )


def _timing(run: Run) -> Timing:
    """The engine's part is that of the last attempt: a replica that is lost says nothing of its own."""
    engine = run.attempt.timing
    first_s = run.first_token_s
    return Timing(
        queue_ms=engine.queue_us / 1e3 if engine else 0.0,
        prefill_ms=engine.prefill_us / 1e3 if engine else 0.0,
        decode_ms=engine.decode_us / 1e3 if engine else 0.0,
        ttft_ms=(first_s - run.arrived_s) * 1e3 if first_s is not None else 0.0,
        total_ms=(monotonic() - run.arrived_s) * 1e3,
    )
