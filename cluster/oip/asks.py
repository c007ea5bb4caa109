"""`ModelInferRequest` as a `Completion`, and what of the answer is wanted back. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cluster.foreign.json_body import read_body
from cluster.foreign.sampling_body import (
    SamplingBody,
    Uint32,
    check_best_of,
    generate_request,
    in_their_words,
    seed_of,
)
from cluster.oip.tensors import OUTPUTS, read_inputs
from cluster.request.completion import Completion
from cluster.request.errors import InvalidRequest
from cluster.request.validation import RequestBounds, parse_generate
from protos import wattline_oip_pb2 as pb

DEFAULT_TOKENS = 16
"""Of the backend whose tensors these are."""
RETURNED = {
    "return_finish_reason": "finish_reason",
    "return_cumulative_logprob": "cumulative_logprob",
    "return_logprobs": "logprobs",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
}
TIMEOUT = "timeout"
"""Microseconds."""
IGNORED = frozenset({"triton_enable_empty_final_response", "binary_data_output"})
"""Parameters of how an answer is packed; each of ours has a final response, and all are binary."""


class ParametersBody(SamplingBody):
    """The JSON of `sampling_parameters`."""

    logprobs: Uint32 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InferAsk:
    """One request. `timeout_s` None: none. `outputs`: names of the tensors that are wanted."""

    request: pb.ModelInferRequest
    completion: Completion
    prompt: str
    is_stream: bool
    has_input_in_output: bool
    outputs: tuple[str, ...]
    timeout_s: float | None


def infer_ask(request: pb.ModelInferRequest, bounds: RequestBounds, draw_seed: Callable[[], int]) -> InferAsk:
    """A validated request. Raises InvalidRequest."""
    values = read_inputs(request)
    prompt, is_stream = str(values["text_input"]), values.get("stream") is True
    excludes_input = values.get("exclude_input_in_output", is_stream)
    if is_stream and not excludes_input:
        raise InvalidRequest(
            field="exclude_input_in_output", got="false", limit="true in a stream", fix="leave it out"
        )
    parameters, timeout_s = _split_parameters(request.parameters)
    body = _read_sampling(values.get("sampling_parameters"), parameters)
    flags = {name for flag, name in RETURNED.items() if values.get(flag) is True}
    completion = _completion(request.model_name, prompt, body, bounds, draw_seed)
    if "cumulative_logprob" in flags and completion.sampling.num_logprobs is None:
        completion = replace(completion, sampling=replace(completion.sampling, num_logprobs=0))
    return InferAsk(
        request=request,
        completion=completion,
        prompt=prompt,
        is_stream=is_stream,
        has_input_in_output=not excludes_input,
        outputs=_outputs(request, {"text_output", *flags}),
        timeout_s=timeout_s,
    )


def _completion(
    model: str, prompt: str, body: ParametersBody, bounds: RequestBounds, draw_seed: Callable[[], int]
) -> Completion:
    check_best_of(body)
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    ours = generate_request(model, body, max_tokens=max_tokens, seed=seed_of(body, draw_seed))
    ours.text = prompt
    if body.logprobs is not None:
        ours.sampling.logprobs = body.logprobs
    return in_their_words(lambda: parse_generate(ours, bounds, draw_seed), prompt="text_input")


def _read_sampling(tensor: str | bool | None, parameters: Mapping[str, object]) -> ParametersBody:
    """From the tensor, or else from the request's own parameters. Numbers may be texts in both."""
    if tensor is None:
        return read_body(ParametersBody, json.dumps(parameters).encode(), strict=False)
    if parameters:
        raise InvalidRequest(
            field="parameters",
            got=", ".join(sorted(parameters))[:64],
            limit="none beside sampling_parameters",
            fix="send them in one of the two",
        )
    try:
        return read_body(ParametersBody, str(tensor).encode(), strict=False)
    except InvalidRequest as error:
        raise error.renamed(f"sampling_parameters.{error.field}") from None


def _split_parameters(
    parameters: Mapping[str, pb.InferParameter],
) -> tuple[dict[str, object], float | None]:
    """What may be sampling options, and the time limit in seconds."""
    values: dict[str, object] = {}
    timeout_s = None
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        value = getattr(parameter, kind) if kind else None
        if name == TIMEOUT:
            if not isinstance(value, int) or value < 0:
                raise InvalidRequest(
                    field=TIMEOUT, got="no number of microseconds", limit="0 or more", fix="leave it out"
                )
            timeout_s = value / 1e6 if value else None
        elif name not in IGNORED:
            values[name] = value
    return values, timeout_s


def _outputs(request: pb.ModelInferRequest, available: set[str]) -> tuple[str, ...]:
    """The outputs that were asked for by name, or else all that the inputs switched on."""
    for output in request.outputs:
        if output.name not in available:
            raise InvalidRequest(
                field="outputs",
                got=f"{output.name[:64]!r}",
                limit=", ".join(name for name in OUTPUTS if name in available),
                fix="set its return_ input too, or leave it out",
            )
    wanted = {output.name for output in request.outputs} or available
    return tuple(name for name in OUTPUTS if name in wanted)
