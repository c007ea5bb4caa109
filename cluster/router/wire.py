"""Answers as protobuf messages of `wattline.v1`, and the metadata that goes with them."""

from __future__ import annotations

from cluster.energy.account import HOST_SOURCE, RequestEnergy
from cluster.request.answer import Completed, TextDelta, Timing, Usage
from cluster.telemetry import semconv
from protos import wattline_inference_pb2 as pb
from replicas.request import FinishReason

FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def delta_message(delta: TextDelta) -> pb.GenerateResponse:
    message = pb.Delta(
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=FINISH_REASONS[delta.finish],
        index=delta.index,
        resume_token=delta.resume_token,
    )
    for said in delta.logprobs:
        entry = message.logprobs.add(logprob=said.logprob)
        for token_id, logprob in said.top:
            entry.top.add(token_id=token_id, logprob=logprob)
    return pb.GenerateResponse(delta=message)


def final_message(completed: Completed) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        final=pb.Final(
            request_id=completed.request_id,
            usage=usage_message(completed.usage),
            timing=_timing_message(completed.timing),
            energy=energy_message(completed.energy, completed.usage, is_settled=completed.is_settled),
            trace_id=completed.trace_id,
            attempts=completed.attempts,
            resumed_at=completed.resumed_at,
        )
    )


def usage_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        wasted_tokens=usage.wasted_tokens,
    )


def energy_message(energy: RequestEnergy | None, usage: Usage, *, is_settled: bool) -> pb.Energy:
    """Joules, per token too; whatever is not known stays unset."""
    state, _ = _energy_state(energy, is_settled=is_settled)
    if energy is None:
        return pb.Energy(state=state)
    total_j = energy.total_mj / 1e3
    output_tokens, total_tokens = usage.completion_tokens, usage.prompt_tokens + usage.completion_tokens
    return pb.Energy(
        total_j=total_j,
        prefill_j=energy.prefill_mj / 1e3,
        decode_j=energy.decode_mj / 1e3,
        static_j=energy.static_mj / 1e3,
        wasted_j=energy.wasted_mj / 1e3,
        joules_per_output_token=total_j / output_tokens if output_tokens else None,
        joules_per_total_token=total_j / total_tokens if total_tokens else None,
        source=energy.source,
        method=energy.method,
        window_ms=energy.window_ms,
        confidence_factor=energy.confidence_factor,
        state=state,
        host_j=None if energy.host_mj is None else energy.host_mj / 1e3,
        host_source="" if energy.host_mj is None else HOST_SOURCE,
    )


def energy_trailers(energy: RequestEnergy | None, *, is_settled: bool) -> tuple[tuple[str, str], ...]:
    """The joules again, for callers and proxies that read only metadata."""
    _, word = _energy_state(energy, is_settled=is_settled)
    state = (semconv.TRAILER_ENERGY_STATE, word)
    if energy is None:
        return (state,)
    return (
        state,
        (semconv.TRAILER_ENERGY_JOULES, f"{energy.total_mj / 1e3:.3f}"),
        (semconv.TRAILER_ENERGY_SOURCE, energy.source),
    )


def _energy_state(energy: RequestEnergy | None, *, is_settled: bool) -> tuple[pb.EnergyState.ValueType, str]:
    if energy is not None and energy.is_final:
        return pb.ENERGY_STATE_FINAL, "final"
    if energy is None and is_settled:
        return pb.ENERGY_STATE_UNSPECIFIED, "unknown"
    return pb.ENERGY_STATE_PROVISIONAL, "provisional"


def _timing_message(timing: Timing) -> pb.Timing:
    return pb.Timing(
        queue_ms=timing.queue_ms,
        prefill_ms=timing.prefill_ms,
        decode_ms=timing.decode_ms,
        ttft_ms=timing.ttft_ms,
        total_ms=timing.total_ms,
    )
