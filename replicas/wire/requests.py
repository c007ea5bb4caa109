"""Requests on their way down. Deadlines travel as time left, so `now_ns` is asked for."""

from __future__ import annotations

import re

from protos import wattline_link_pb2 as link_pb2
from replicas.request import GenerationRequest, SamplingParams

NS_PER_MS = 1_000_000
MAX_TENANT_CHARS = 128
MAX_DEADLINE_MS = 2**32 - 1
"""The most the wire holds, 49 days; a caller may have more time, which no answer needs."""
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C trace context. What is none is left out: it is for logs, and these are read line by line."""


def request_to_wire(request: GenerationRequest, *, now_ns: int) -> link_pb2.Submit:
    """An expired deadline becomes 1 ms: 0 on the wire means none."""
    deadline_ms = 0
    if request.deadline_ns is not None:
        left_ms = -(-(request.deadline_ns - now_ns) // NS_PER_MS)
        deadline_ms = min(max(left_ms, 1), MAX_DEADLINE_MS)
    return link_pb2.Submit(
        request_id=request.request_id,
        attempt=request.attempt,
        first_offset=request.first_offset,
        prompt_ids=request.prompt_ids,
        sampling=_sampling_to_wire(request.sampling),
        max_tokens=request.max_tokens,
        stop_token_ids=sorted(request.stop_token_ids),
        priority=request.priority,
        deadline_ms=deadline_ms,
        lane=request.lane,
        traceparent=request.traceparent,
        cache_salt=request.cache_salt,
        prompt_logprobs=request.scores_prompt,
        tenant=request.tenant,
    )


def request_from_wire(message: link_pb2.Submit, *, now_ns: int) -> GenerationRequest:
    """The fields are checked where they are used: by the engine."""
    return GenerationRequest(
        request_id=message.request_id,
        prompt_ids=tuple(message.prompt_ids),
        max_tokens=message.max_tokens,
        sampling=_sampling_from_wire(message.sampling),
        stop_token_ids=frozenset(message.stop_token_ids),
        priority=message.priority,
        deadline_ns=now_ns + message.deadline_ms * NS_PER_MS if message.deadline_ms else None,
        lane=message.lane,
        attempt=message.attempt,
        first_offset=message.first_offset,
        cache_salt=message.cache_salt,
        scores_prompt=message.prompt_logprobs,
        tenant=message.tenant[:MAX_TENANT_CHARS],
        traceparent=message.traceparent if TRACEPARENT.fullmatch(message.traceparent) else "",
    )


def _sampling_to_wire(sampling: SamplingParams) -> link_pb2.EngineSampling:
    return link_pb2.EngineSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.num_logprobs,
    )


def _sampling_from_wire(message: link_pb2.EngineSampling) -> SamplingParams:
    """Biases in the order of their tokens: a map has none of its own, and all ranks must see one."""
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty or 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())) if message.logit_bias else (),
        num_logprobs=message.logprobs if message.HasField("logprobs") else None,
    )
