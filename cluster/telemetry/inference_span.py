"""The span of the model's work for one request, and its children queue, prefill and decode.

They name the engine's steps by number, so that a trace and what a replica logs of a step find each other. The
span ends twice: `finish` fixes its end time and what was done, `export` adds the joules and lets it go.
"""

from __future__ import annotations

from time import time_ns

from opentelemetry.trace import (
    Span,
    Status,
    StatusCode,
    Tracer,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)

from cluster.energy.account import HOST_SOURCE, RequestEnergy
from cluster.request.answer import Usage
from cluster.request.errors import RouterError
from cluster.telemetry import semconv
from replicas.request import FinishReason, SequenceTiming
from replicas.step_trail import StepTrail

NS_PER_US = 1_000
US_PER_MS = 1_000


class InferenceSpan:
    """Started when the request goes down the link. Mutable; owned by the event loop."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._attempt_start_ns = time_ns()
        self._end_ns: int | None = None

    @property
    def is_recording(self) -> bool:
        return self._span.is_recording()

    @property
    def trace_id(self) -> str:
        return format_trace_id(self._span.get_span_context().trace_id)

    @property
    def traceparent(self) -> str:
        """The W3C trace context that goes to the replica."""
        context = self._span.get_span_context()
        trace_id, span_id = format_trace_id(context.trace_id), format_span_id(context.span_id)
        return f"00-{trace_id}-{span_id}-{context.trace_flags:02x}"

    def add_failover(self, *, reason: str, offset: int, from_replica: str, to_replica: str) -> None:
        """Another replica goes on with the token at `offset`, now."""
        self._attempt_start_ns = time_ns()
        self._span.add_event(
            semconv.FAILOVER_EVENT,
            {
                semconv.FAILOVER_REASON: reason,
                semconv.FAILOVER_OFFSET: offset,
                semconv.FAILOVER_FROM: from_replica,
                semconv.FAILOVER_TO: to_replica,
            },
            timestamp=self._attempt_start_ns,
        )

    def finish(
        self,
        *,
        replica_id: str,
        epoch: int,
        usage: Usage,
        timing: SequenceTiming | None,
        resumed_at: tuple[int, ...],
        outcome: FinishReason | RouterError | None,
    ) -> None:
        """The model's work is over, now. `outcome` None: the caller went away."""
        self._end_ns = time_ns()
        if not self.is_recording:
            return
        self._span.set_attributes(
            {
                semconv.REPLICA_ID: replica_id,
                semconv.REPLICA_EPOCH: epoch,
                semconv.INPUT_TOKENS: usage.prompt_tokens,
                semconv.CACHED_TOKENS: usage.cached_tokens,
                semconv.OUTPUT_TOKENS: usage.completion_tokens,
                semconv.WASTED_TOKENS: usage.wasted_tokens,
                semconv.FINISH_REASONS: (
                    outcome.name.lower()
                    if isinstance(outcome, FinishReason)
                    else "cancelled"
                    if outcome is None
                    else "error",
                ),
            }
        )
        if isinstance(outcome, RouterError):
            self._span.set_attribute(semconv.ERROR_TYPE, type(outcome).__name__)
            self._span.set_status(Status(StatusCode.ERROR))
        if resumed_at:
            self._span.set_attributes(
                {semconv.ATTEMPTS: 1 + len(resumed_at), semconv.RESUMED_AT: list(resumed_at)}
            )
        if timing is not None:
            self._span.set_attribute(semconv.PREEMPTIONS, timing.preemptions)
            self._add_phases(timing)

    def export(self, energy: RequestEnergy | None, *, idle_share_mj: float | None, pue: float) -> None:
        """End it at the time it finished, with the joules that are known by now.

        Its shares of the idle energy and of the host, and the building's PUE, stand beside its bill.
        """
        self._span.set_attribute(semconv.ENERGY_FINAL, energy is not None and energy.is_final)
        if energy is not None:
            self._span.set_attributes(
                {
                    semconv.ENERGY_TOTAL_J: energy.total_mj / 1e3,
                    semconv.ENERGY_PREFILL_J: energy.prefill_mj / 1e3,
                    semconv.ENERGY_DECODE_J: energy.decode_mj / 1e3,
                    semconv.ENERGY_STATIC_J: energy.static_mj / 1e3,
                    semconv.ENERGY_WASTED_J: energy.wasted_mj / 1e3,
                    semconv.ENERGY_SOURCE: energy.source,
                    semconv.ENERGY_METHOD: energy.method,
                    semconv.ENERGY_WINDOW_MS: energy.window_ms,
                    semconv.ENERGY_CONFIDENCE: energy.confidence_factor,
                }
            )
            self._span.set_attribute(semconv.ENERGY_PUE, pue)
            if energy.host_mj is not None:
                self._span.set_attribute(semconv.ENERGY_HOST_J, energy.host_mj / 1e3)
                self._span.set_attribute(semconv.ENERGY_HOST_SOURCE, HOST_SOURCE)
            if idle_share_mj is not None:
                self._span.set_attribute(semconv.ENERGY_IDLE_SHARE_J, idle_share_mj / 1e3)
        self._span.end(end_time=self._end_ns)

    def _add_phases(self, timing: SequenceTiming) -> None:
        """Child spans from the engine's durations, laid end to end from its submission on.

        They are of the last attempt: a replica that is lost says nothing of its own.
        """
        queued_ns = self._attempt_start_ns + timing.queue_us * NS_PER_US
        first_token_ns = queued_ns + timing.prefill_us * NS_PER_US
        end_ns = first_token_ns + timing.decode_us * NS_PER_US
        self._start_phase(semconv.QUEUE, self._attempt_start_ns).end(end_time=queued_ns)
        prefill = self._start_phase(semconv.PREFILL, queued_ns)
        decode = self._start_phase(semconv.DECODE, first_token_ns)
        if timing.trail is not None:
            self._span.set_attributes(_steps(timing.trail))
            prefill.set_attributes(_prefill_steps(timing.trail))
            decode.set_attributes(_decode_steps(timing.trail))
            _add_longest_gap(decode, timing.trail, first_token_ns=first_token_ns)
        prefill.end(end_time=first_token_ns)
        decode.end(end_time=end_ns)

    def _start_phase(self, name: str, start_ns: int) -> Span:
        return self._tracer.start_span(name, context=set_span_in_context(self._span), start_time=start_ns)


def _steps(trail: StepTrail) -> dict[str, int]:
    return {
        semconv.STEP_FIRST: trail.first_step,
        semconv.STEP_LAST: trail.last_step,
        semconv.STEP_COUNT: trail.num_steps,
    }


def _prefill_steps(trail: StepTrail) -> dict[str, int]:
    return {
        semconv.STEP_FIRST: trail.first_step,
        semconv.STEP_LAST: trail.first_token_step or trail.last_step,
        semconv.STEP_COUNT: trail.num_prefill_steps,
    }


def _decode_steps(trail: StepTrail) -> dict[str, int]:
    """Empty where it gave one token or none."""
    if trail.first_token_step is None or not trail.num_decode_steps:
        return {}
    return {
        semconv.STEP_FIRST: trail.first_token_step + 1,
        semconv.STEP_LAST: trail.last_step,
        semconv.STEP_COUNT: trail.num_decode_steps,
    }


def _add_longest_gap(decode: Span, trail: StepTrail, *, first_token_ns: int) -> None:
    gap = trail.longest_gap
    if gap is not None:
        decode.add_event(
            semconv.TOKEN_GAP_EVENT,
            {semconv.TOKEN_GAP_MS: gap.duration_us / US_PER_MS, semconv.TOKEN_GAP_STEP: gap.step},
            timestamp=first_token_ns + gap.end_us * NS_PER_US,
        )
