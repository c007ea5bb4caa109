"""Closes the books of a request when its tokens have ended: usage, timing, metrics, span, energy record."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

from cluster.link.token_stream import TokenStream
from cluster.router.answer import Timing, Usage
from cluster.router.energy_account import EnergyAccount
from cluster.router.energy_record import EnergyRecord, FinishedRequest
from cluster.router.errors import RouterError, status_of
from cluster.router.journal import ClosedRequest, Journal
from cluster.router.served_model import ServedModel
from cluster.telemetry.inference_span import InferenceSpan
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import Telemetry
from replicas.request import FinishReason, SequenceTiming


@dataclass(slots=True, kw_only=True)
class Run:
    """One request at one replica, and how far it got. Mutable; owned by its stream.

    `outcome` None when the books are closed: the caller went away. `timing` None: the engine gave none.
    """

    request_id: str
    arrived_s: float
    model: ServedModel
    replica_id: str
    stream: TokenStream
    account: EnergyAccount
    span: InferenceSpan
    prompt_tokens: int
    completion_tokens: int = 0
    outcome: FinishReason | RouterError | None = None
    timing: SequenceTiming | None = None


class Books:
    """Where all that is remembered of a request goes."""

    def __init__(
        self, *, record: EnergyRecord, journal: Journal, metrics: RouterMetrics, telemetry: Telemetry
    ) -> None:
        self._record = record
        self._journal = journal
        self._metrics = metrics
        self._telemetry = telemetry

    def close(self, run: Run) -> tuple[Usage, Timing]:
        """Called once per request, however it ended. Its joules follow when its account is settled."""
        usage, timing = _usage(run), _timing(run)
        model = run.model
        model.prompt_tokens_total += usage.prompt_tokens
        model.output_tokens_total += usage.completion_tokens
        self._metrics.count_tokens(model.name, usage)
        closed = _closed(run, usage, timing)
        is_met = self._journal.add(closed)
        self._metrics.observe_request(closed, is_met=is_met)
        self._record.add(
            FinishedRequest(request_id=run.request_id, model=model.name, usage=usage, account=run.account)
        )
        run.span.finish(replica_id=run.replica_id, usage=usage, timing=run.timing, outcome=run.outcome)
        self._telemetry.hold_for_energy(run.span, run.account)
        self._book_energy(run.account, model, usage)
        return usage, timing

    def _book_energy(self, account: EnergyAccount, model: ServedModel, usage: Usage) -> None:
        def settled() -> None:
            if account.energy is not None:
                self._metrics.add_energy(model.name, account.energy)
                model.add_energy(account.energy, output_tokens=usage.completion_tokens)
                self._journal.of_model(model.name).add_bill(
                    energy_mj=account.energy.total_mj,
                    usage=usage,
                    source=account.energy.source,
                    now_s=monotonic(),
                )

        account.when_settled(settled)


def _closed(run: Run, usage: Usage, timing: Timing) -> ClosedRequest:
    first_s, last_s = run.stream.first_token_s, run.stream.last_token_s
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
        account=run.account,
    )


def _outcome(outcome: FinishReason | RouterError | None) -> str:
    """One of a few words: it becomes a label."""
    if outcome is None:
        return "cancelled"
    return outcome.name.lower() if isinstance(outcome, FinishReason) else status_of(outcome).code.name


def _usage(run: Run) -> Usage:
    engine_wasted = run.timing.wasted_tokens if run.timing else 0
    return Usage(
        prompt_tokens=run.prompt_tokens,
        cached_tokens=run.timing.cached_tokens if run.timing else 0,
        completion_tokens=run.completion_tokens,
        wasted_tokens=run.stream.wasted_tokens + engine_wasted,
    )


def _timing(run: Run) -> Timing:
    engine = run.timing
    first_s = run.stream.first_token_s
    return Timing(
        queue_ms=engine.queue_us / 1e3 if engine else 0.0,
        prefill_ms=engine.prefill_us / 1e3 if engine else 0.0,
        decode_ms=engine.decode_us / 1e3 if engine else 0.0,
        ttft_ms=(first_s - run.arrived_s) * 1e3 if first_s is not None else 0.0,
        total_ms=(monotonic() - run.arrived_s) * 1e3,
    )
