"""What is said of one sequence: its new tokens, how it ended, and where its time went."""

from __future__ import annotations

from collections.abc import Iterable

from protos import wattline_link_pb2 as link_pb2
from replicas.request import FinishReason, SequenceDelta, SequenceTiming, TokenLogprobs
from replicas.wire.trails import trail_from_wire, trail_to_wire

FINISH_TO_WIRE = {
    FinishReason.STOP: link_pb2.ENGINE_FINISH_STOP,
    FinishReason.LENGTH: link_pb2.ENGINE_FINISH_LENGTH,
    FinishReason.CANCELLED: link_pb2.ENGINE_FINISH_CANCELLED,
    FinishReason.DEADLINE: link_pb2.ENGINE_FINISH_DEADLINE,
    FinishReason.ERROR: link_pb2.ENGINE_FINISH_ERROR,
}
FINISH_FROM_WIRE = {wire: reason for reason, wire in FINISH_TO_WIRE.items()}


def delta_to_wire(delta: SequenceDelta) -> link_pb2.SequenceDelta:
    message = link_pb2.SequenceDelta(
        request_id=delta.request_id,
        attempt=delta.attempt,
        first_offset=delta.first_offset,
        token_ids=delta.token_ids,
    )
    if delta.finish is not None:
        message.finish = FINISH_TO_WIRE[delta.finish]
    if delta.timing is not None:
        message.timing.CopyFrom(_timing_to_wire(delta.timing))
    if delta.error is not None:
        message.error.code, message.error.message = delta.error
    if delta.logprobs:
        message.logprobs.extend(_logprobs_to_wire(delta.logprobs))
    if delta.prompt_logprobs:
        message.prompt_logprobs.extend(_logprobs_to_wire(delta.prompt_logprobs))
    return message


def _logprobs_to_wire(logprobs: Iterable[TokenLogprobs]) -> list[link_pb2.EngineLogprobs]:
    return [
        link_pb2.EngineLogprobs(
            logprob=said.logprob,
            top_ids=[token_id for token_id, _ in said.top],
            top_logprobs=[logprob for _, logprob in said.top],
        )
        for said in logprobs
    ]


def delta_from_wire(message: link_pb2.SequenceDelta) -> SequenceDelta:
    return SequenceDelta(
        request_id=message.request_id,
        attempt=message.attempt,
        first_offset=message.first_offset,
        token_ids=tuple(message.token_ids),
        finish=FINISH_FROM_WIRE.get(message.finish),
        timing=timing_from_wire(message),
        error=(message.error.code, message.error.message) if message.HasField("error") else None,
        logprobs=logprobs_from_wire(message.logprobs) if message.logprobs else (),
        prompt_logprobs=logprobs_from_wire(message.prompt_logprobs) if message.prompt_logprobs else (),
    )


def logprobs_from_wire(entries: Iterable[link_pb2.EngineLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(logprob=said.logprob, top=tuple(zip(said.top_ids, said.top_logprobs, strict=True)))
        for said in entries
    )


def _timing_to_wire(timing: SequenceTiming) -> link_pb2.SequenceTiming:
    return link_pb2.SequenceTiming(
        queue_us=timing.queue_us,
        prefill_us=timing.prefill_us,
        decode_us=timing.decode_us,
        cached_tokens=timing.cached_tokens,
        wasted_tokens=timing.wasted_tokens,
        preemptions=timing.preemptions,
        trail=None if timing.trail is None else trail_to_wire(timing.trail),
    )


def timing_from_wire(message: link_pb2.SequenceDelta) -> SequenceTiming | None:
    """None but on the last delta of a sequence."""
    if not message.HasField("timing"):
        return None
    timing = message.timing
    return SequenceTiming(
        queue_us=timing.queue_us,
        prefill_us=timing.prefill_us,
        decode_us=timing.decode_us,
        cached_tokens=timing.cached_tokens,
        wasted_tokens=timing.wasted_tokens,
        preemptions=timing.preemptions,
        trail=trail_from_wire(timing.trail) if timing.HasField("trail") else None,
    )
