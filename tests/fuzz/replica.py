"""What a replica says of its requests, up to the spans a collector gets."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.link.messages import parse_end, parse_energy
from cluster.link.plausibility import strike_untrue
from cluster.request.answer import Usage
from cluster.telemetry.inference_span import InferenceSpan
from protos import wattline_link_pb2 as link
from replicas.request import FinishReason, SequenceTiming
from replicas.wire.deltas import logprobs_from_wire, timing_from_wire

USAGE = Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=2, wasted_tokens=0)
FROM_REPLICA = link.FromReplica(
    epoch=7,
    step=link.StepOutput(
        deltas=[
            link.SequenceDelta(
                request_id=1,
                token_ids=[5, 6],
                finish=link.ENGINE_FINISH_STOP,
                timing=link.SequenceTiming(
                    queue_us=3,
                    prefill_us=4,
                    decode_us=9,
                    trail=link.StepTrail(
                        first_step=5,
                        first_token_step=6,
                        last_step=7,
                        prefill_steps=2,
                        decode_steps=1,
                        longest_gap=link.TokenGap(duration_us=9, end_us=9, step=7),
                    ),
                ),
            )
        ]
    ),
)
BILLS = link.FromReplica(
    epoch=7,
    energy=link.EnergyReport(requests=[link.RequestEnergy(request_id=1, prefill_mj=5, source="fake")]),
)


def read_from_replica(message: link.FromReplica) -> None:
    strike_untrue(message)
    for delta in message.step.deltas:
        parse_end(delta)
        logprobs_from_wire(delta.logprobs)
        logprobs_from_wire(delta.prompt_logprobs)
        if (timing := timing_from_wire(delta)) is not None:
            encode_spans(make_spans(timing))
    for entry in message.energy.requests:
        parse_energy(entry)


def make_spans(timing: SequenceTiming) -> Sequence[ReadableSpan]:
    """As the exporter is given them."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("fuzz")
    span = InferenceSpan(tracer, tracer.start_span("inference"))
    span.finish(replica_id="r", epoch=7, usage=USAGE, timing=timing, resumed_at=(), outcome=FinishReason.STOP)
    span.export(None, idle_share_mj=None, pue=1.0)
    return exporter.get_finished_spans()
