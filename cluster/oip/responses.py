"""Pieces of an answer as `ModelInferResponse`s: an element for each choice in a tensor, joules at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from cluster.oip.asks import InferAsk
from cluster.oip.descriptions import MODEL_VERSION
from cluster.oip.tensors import response_tensors
from cluster.request.answer import Completed, TextDelta
from cluster.router.wire import energy_trailers
from cluster.telemetry import semconv
from cluster.text.text_threads import SAID_SIZE
from protos import wattline_oip_pb2 as pb
from replicas.request import FinishReason, TokenLogprobs

FINISH_REASONS = {None: "None", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
"""A piece that is not the last says "None", as Python writes it: so does the backend they come from."""

Decode = Callable[[Sequence[int]], str]


class Choices:
    """What there is of each choice and was not written yet. Mutable; one per request."""

    def __init__(self, ask: InferAsk, decode: Decode, *, prompt_tokens: int) -> None:
        self._ask = ask
        self._decode = decode
        self._prompt_tokens = prompt_tokens
        count = ask.completion.num_choices
        first = ask.prompt if ask.has_input_in_output else ""
        self._texts = [first] * count
        self._finishes: list[FinishReason | None] = [None] * count
        self._token_ids: list[list[int]] = [[] for _ in range(count)]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in range(count)]
        self._sums = [0.0] * count

    def add(self, delta: TextDelta) -> None:
        index = delta.index
        self._texts[index] += delta.text
        self._finishes[index] = delta.finish or self._finishes[index]
        self._token_ids[index] += delta.token_ids
        self._logprobs[index] += delta.logprobs
        self._sums[index] += sum(said.logprob for said in delta.logprobs)

    @property
    def size(self) -> int:
        """Characters that logprobs make of the next response; its texts are there already."""
        is_said = "logprobs" in self._ask.outputs
        return SAID_SIZE * sum([len(said) for said in self._logprobs]) if is_said else 0

    def take(self, end: Completed | None = None) -> pb.ModelInferResponse:
        """A response with all that was added since the last. `end`: it is the last, and has the joules."""
        request = self._ask.request
        tensors, contents = response_tensors({name: self._values(name) for name in self._ask.outputs})
        for parts in (self._token_ids, self._logprobs):
            for part in parts:
                part.clear()
        self._texts = [""] * len(self._texts)
        return pb.ModelInferResponse(
            model_name=request.model_name,
            model_version=MODEL_VERSION,
            id=request.id,
            parameters=_parameters(end),
            outputs=tensors,
            raw_output_contents=contents,
        )

    def _values(self, name: str) -> Sequence[str] | Sequence[int] | Sequence[float]:
        match name:
            case "text_output":
                return self._texts
            case "finish_reason":
                return [FINISH_REASONS[finish] for finish in self._finishes]
            case "cumulative_logprob":
                return self._sums
            case "logprobs":
                return [self._said(index) for index in range(len(self._texts))]
            case "num_input_tokens":
                return [self._prompt_tokens]
            case _:
                return [len(token_ids) for token_ids in self._token_ids]

    def _said(self, index: int) -> str:
        """JSON: for each token a map of token ids, the sampled one first. A rank is null if not known."""
        if self._ask.completion.sampling.num_logprobs is None:
            return "null"
        tokens = []
        for token_id, said in zip(self._token_ids[index], self._logprobs[index], strict=True):
            ranks = {top_id: (rank, logprob) for rank, (top_id, logprob) in enumerate(said.top, 1)}
            entries = {token_id: ranks.pop(token_id, (None, said.logprob)), **ranks}
            entry = {
                str(each): {"logprob": logprob, "rank": rank, "decoded_token": self._decode((each,))}
                for each, (rank, logprob) in entries.items()
            }
            # One call for all of them would keep the event loop waiting for the interpreter to its end.
            tokens.append(json.dumps(entry))
        return f"[{', '.join(tokens)}]"


def _parameters(end: Completed | None) -> dict[str, pb.InferParameter]:
    """Triton's word for the last response; on it, what gRPC's trailers say too."""
    parameters = {"triton_final_response": pb.InferParameter(bool_param=end is not None)}
    if end is None:
        return parameters
    texts = {
        semconv.TRAILER_REQUEST_ID: end.request_id,
        semconv.TRAILER_TRACE_ID: end.trace_id,
        **dict(energy_trailers(end.energy, is_settled=end.is_settled)),
    }
    texts.pop(semconv.TRAILER_ENERGY_JOULES, None)
    for name, text in texts.items():
        parameters[_parameter_name(name)] = pb.InferParameter(string_param=text)
    if end.energy is not None:
        joules, output_tokens = end.energy.total_mj / 1e3, end.usage.completion_tokens
        parameters[_parameter_name(semconv.TRAILER_ENERGY_JOULES)] = pb.InferParameter(double_param=joules)
        if output_tokens:
            per_token = pb.InferParameter(double_param=joules / output_tokens)
            parameters["wattline_energy_joules_per_output_token"] = per_token
    return parameters


def _parameter_name(trailer: str) -> str:
    return trailer.replace("-", "_")
