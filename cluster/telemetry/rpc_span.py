"""The server span of one call, gRPC or HTTP, and the spans of the router's own work below it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, format_trace_id, set_span_in_context

from cluster.request.completion import ChatPrompt, Completion, Prompt, TextPrompt, Turn
from cluster.telemetry import semconv
from cluster.telemetry.inference_span import InferenceSpan

MAX_PROMPT_CHARS = 65_536
"""Of a prompt on a span, where prompts are recorded at all."""


class RpcSpan:
    """Started when a call arrives; the root of what the router does for it."""

    def __init__(
        self,
        tracer: Tracer,
        *,
        name: str,
        attributes: Mapping[str, str],
        parent: Context,
        records_prompts: bool = False,
    ) -> None:
        self._tracer = tracer
        self._records_prompts = records_prompts
        self._span = tracer.start_span(
            name, context=parent, kind=SpanKind.SERVER, attributes=dict(attributes)
        )
        self._context = set_span_in_context(self._span, parent)
        self.trace_id = format_trace_id(self._span.get_span_context().trace_id)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A child span around a piece of the router's own work. None where nobody reads it."""
        if not self._span.is_recording():
            yield
            return
        span = self._tracer.start_span(name, context=self._context)
        try:
            yield
        except Exception as error:
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute(semconv.ERROR_TYPE, type(error).__name__)
            raise
        finally:
            span.end()

    def start_inference(self, completion: Completion, *, request_id: str, max_tokens: int) -> InferenceSpan:
        """The span of the model's work, as the GenAI conventions name it; this one where nobody reads it."""
        if not self._span.is_recording():
            return InferenceSpan(self._tracer, self._span)
        sampling = completion.sampling
        span = self._tracer.start_span(
            f"{completion.operation} {completion.model}",
            context=self._context,
            attributes={
                semconv.OPERATION_NAME: completion.operation.value,
                semconv.PROVIDER_NAME: semconv.PROVIDER,
                semconv.REQUEST_MODEL: completion.model,
                semconv.RESPONSE_MODEL: completion.model,
                semconv.RESPONSE_ID: request_id,
                semconv.REQUEST_MAX_TOKENS: max_tokens,
                semconv.REQUEST_TEMPERATURE: sampling.temperature,
                semconv.REQUEST_TOP_P: sampling.top_p,
                semconv.REQUEST_TOP_K: sampling.top_k,
                # Attributes are signed; half of all seeds are not.
                semconv.REQUEST_SEED: str(sampling.seed),
            },
        )
        if self._records_prompts:
            span.set_attribute(semconv.INPUT_MESSAGES, _prompt_json(completion.prompt))
        return InferenceSpan(self._tracer, span)

    def end(self, code: str) -> None:
        """The call is over with this gRPC code."""
        self._span.set_attribute(semconv.RPC_STATUS_CODE, code)
        if code in semconv.SERVER_ERROR_CODES:
            self._span.set_attribute(semconv.ERROR_TYPE, code)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _prompt_json(prompt: Prompt) -> str:
    """The prompt as the GenAI conventions write messages, cut to a bound; token ids have no text here."""
    match prompt:
        case ChatPrompt():
            turns = prompt.turns
        case TextPrompt():
            turns = (Turn(role="user", content=prompt.text),)
        case _:
            turns = ()
    left = MAX_PROMPT_CHARS
    messages = []
    for turn in turns:
        parts = [{"type": "text", "content": turn.content[:left]}]
        messages.append({"role": turn.role, "parts": parts})
        left = max(0, left - len(turn.content))
    return json.dumps(messages)
