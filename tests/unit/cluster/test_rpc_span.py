"""The spans of a request where no collector reads them."""

from __future__ import annotations

from cluster.config import TelemetrySection
from cluster.request.validation import RequestBounds, parse_generate
from cluster.telemetry.tracing import Telemetry
from protos import wattline_inference_pb2 as pb

TRACE_ID, CALLERS_SPAN = 32 * "a", 16 * "b"
BOUNDS = RequestBounds(max_prompt_bytes=64, max_output_tokens=8, vocab_size=300, has_chat_template=True)


def test_a_request_that_nobody_records_keeps_its_callers_trace() -> None:
    telemetry = Telemetry(TelemetrySection(), router_id="router", version="0")
    completion = parse_generate(pb.GenerateRequest(model="m", text="hello"), BOUNDS, lambda: 1)
    span = telemetry.start_rpc("Generate", [("traceparent", f"00-{TRACE_ID}-{CALLERS_SPAN}-01")])
    with span.stage("route"):
        inference = span.start_inference(completion, request_id="r", max_tokens=8)

    version, trace_id, span_id, flags = inference.traceparent.split("-")
    assert (version, trace_id, flags) == ("00", TRACE_ID, "00")
    assert span_id != CALLERS_SPAN
    assert not inference.is_recording
