"""Closes the books of a request when its tokens have ended: usage, timing, metrics, span, energy record."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

from cluster.link.token_stream import TokenStream
from cluster.router.answer import Timing, Usage
from cluster.router.energy_account import EnergyAccount
from cluster.router.energy_record import EnergyRecord, FinishedRequest
from cluster.router.errors import RouterError
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

    def __init__(self, *, record: EnergyRecord, metrics: RouterMetrics, telemetry: Telemetry) -> None:
        self._record = record
        self._metrics = metrics
        self._telemetry = telemetry

    def close(self, run: Run) -> tuple[Usage, Timing]:
        """Called once per request, however it ended. Its joules follow when its account is settled."""
        usage, timing = _usage(run), _timing(run)
        model = run.model
        model.prompt_tokens_total += usage.prompt_tokens
        model.output_tokens_total += usage.completion_tokens
        self._metrics.count_tokens(model.name, usage)
        if run.stream.first_token_s is not None and run.stream.last_token_s is not None:
            decode_s = run.stream.last_token_s - run.stream.first_token_s
            self._metrics.observe_answer(model.name, usage=usage, timing=timing, decode_s=decode_s)
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

        account.when_settled(settled)


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
