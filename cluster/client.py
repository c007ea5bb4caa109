"""A small typed gRPC client of a router, for the commands, the demo and as an example of one.

    with Client("127.0.0.1:50051") as client:
        for event in client.chat("llama-demo", [("user", "Who are you?")]):
            ...  # `Delta`s as they come, then one `Final` with tokens, times and joules

Synchronous; one channel; safe to share between threads. Closing an iterator early cancels its request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

import grpc

from cluster import replies
from cluster.access import Access, open_channel
from cluster.command_error import CommandError
from cluster.resuming import AnswerStream, countdown, resumed, whole
from cluster.status_replies import to_fleet_event, to_model_state, to_request_state
from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_cluster_pb2_grpc as cluster_rpc
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as rpc

ASK_TIMEOUT_S = 10.0

FINISH_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}

Answer = TypeVar("Answer")


class CallError(CommandError):
    """A call the router refused, or could not finish. `code` is the gRPC status name, e.g. UNAVAILABLE."""

    def __init__(self, *, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class RouterAway(CallError):
    """UNAVAILABLE: another router may do it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """How answers are drawn and where they end. None: the server's default.

    `logprobs`: of every token, and of this many of the likeliest beside it. `num_choices`: answers side by
    side, told apart by `Delta.index`. `resume`: where the router is lost, one answer goes on at another.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    num_choices: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    priority: int = 0
    energy_wait_ms: int | None = None
    timeout_s: float | None = None
    resume: bool = True

    def sampling(self) -> pb.Sampling:
        return pb.Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            logprobs=self.logprobs,
            n=self.num_choices,
            seed=self.seed,
        )

    def limits(self) -> pb.Limits:
        return pb.Limits(max_tokens=self.max_tokens, stop=self.stop, ignore_eos=self.ignore_eos)


class Client:
    """Calls one router, or one of several that serve the same."""

    def __init__(self, address: str, access: Access | None = None) -> None:
        """`address`: host:port, or several with commas. `access` None: routers that ask for nothing."""
        self.address = address
        access = access or Access()
        self._metadata = access.metadata
        self._channels = [open_channel(one.strip(), access) for one in address.split(",")]
        self._inference = [rpc.InferenceStub(channel) for channel in self._channels]
        self._cluster = [cluster_rpc.ClusterStub(channel) for channel in self._channels]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def generate(
        self, model: str, prompt: str | Iterable[int], ask: Ask | None = None
    ) -> Iterator[replies.Delta | replies.Final]:
        """Complete a text or token ids. Raises CallError."""
        ask = ask or Ask()
        if isinstance(prompt, str):
            check_text(prompt)
        request = pb.GenerateRequest(
            model=model,
            sampling=ask.sampling(),
            limits=ask.limits(),
            priority=ask.priority,
            energy_wait_ms=ask.energy_wait_ms,
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokens.ids.extend(prompt)
        return self._stream([stub.Generate for stub in self._inference], request, ask)

    def chat(
        self, model: str, messages: Iterable[tuple[str, str]], ask: Ask | None = None
    ) -> Iterator[replies.Delta | replies.Final]:
        """Answer a conversation of (role, content) pairs. Raises CallError."""
        ask = ask or Ask()
        request = pb.ChatRequest(
            model=model,
            messages=[to_message(role, content) for role, content in messages],
            sampling=ask.sampling(),
            limits=ask.limits(),
            priority=ask.priority,
            energy_wait_ms=ask.energy_wait_ms,
        )
        return self._stream([stub.Chat for stub in self._inference], request, ask)

    def list_models(self) -> tuple[replies.ModelCard, ...]:
        answer = self._call([stub.ListModels for stub in self._inference], pb.ListModelsRequest())
        return tuple(
            replies.ModelCard(
                name=model.name,
                architecture=model.architecture,
                context_tokens=model.context_tokens,
                max_output_tokens=model.max_output_tokens,
                ready_replicas=model.ready_replicas,
                has_chat=model.chat,
            )
            for model in answer.models
        )

    def tokenize_chat(self, model: str, messages: Iterable[tuple[str, str]]) -> tuple[int, ...]:
        """The prompt a conversation of (role, content) pairs becomes, as token ids."""
        conversation = pb.Conversation(messages=[to_message(role, content) for role, content in messages])
        request = pb.TokenizeRequest(model=model, conversation=conversation)
        answer = self._call([stub.Tokenize for stub in self._inference], request)
        return tuple(answer.token_ids)

    def get_energy(self, request_id: str) -> replies.Energy:
        """The energy of a finished request, final once `is_final`."""
        request = pb.GetEnergyRequest(request_id=request_id)
        answer = self._call([stub.GetEnergy for stub in self._inference], request)
        return to_energy(answer.energy)

    def status(self, *, timeout_s: float = ASK_TIMEOUT_S, last_requests: int = 0) -> replies.RouterState:
        request = cluster_pb.StatusRequest(last_requests=last_requests)
        answer = self._call([stub.Status for stub in self._cluster], request, timeout_s=timeout_s)
        return replies.RouterState(
            router_id=answer.router_id,
            version=answer.version,
            uptime_s=answer.uptime_s,
            models=tuple(to_model_state(model) for model in answer.models),
            last_requests=tuple(to_request_state(request) for request in answer.last_requests),
            events=tuple(to_fleet_event(event) for event in answer.events),
        )

    def explain(self, request_or_trace_id: str) -> tuple[cluster_pb.RequestStory, ...]:
        """What happened to a request, or to all of a trace, once they ended. Raises CallError.

        The messages themselves: they are read once, to be shown or written down.
        """
        request = cluster_pb.ExplainRequest(id=request_or_trace_id)
        answer = self._call([stub.Explain for stub in self._cluster], request)
        return tuple(answer.stories)

    def _call(
        self,
        methods: Sequence[Callable[..., Answer]],
        request: object,
        *,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> Answer:
        """Ask the first router that answers."""
        for method in methods[:-1]:
            with suppress(RouterAway):
                return self._ask(method, request, timeout_s)
        return self._ask(methods[-1], request, timeout_s)

    def _ask(self, method: Callable[..., Answer], request: object, timeout_s: float) -> Answer:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._explain(error) from error

    def _stream(
        self,
        methods: Sequence[Callable[..., AnswerStream]],
        request: pb.GenerateRequest | pb.ChatRequest,
        ask: Ask,
    ) -> Iterator[replies.Delta | replies.Final]:
        def start(request: pb.GenerateRequest | pb.ChatRequest, attempt: int) -> AnswerStream:
            method = methods[attempt % len(methods)]
            return method(request, timeout=left_s(), metadata=self._metadata)

        left_s = countdown(ask.timeout_s)
        try:
            if ask.resume:
                messages = resumed(request, start, num_routers=len(methods))
            else:
                messages = whole(start(request, 0))
            for message in messages:
                yield to_event(message)
        except grpc.RpcError as error:
            raise self._explain(error) from error

    def _explain(self, error: grpc.RpcError) -> CallError:
        assert isinstance(error, grpc.Call)
        code, text = error.code().name, error.details() or ""
        if code == "UNAVAILABLE" and ("failed to connect" in text or "DNS resolution" in text):
            text = f"no router at {self.address}; start one with `wattline up -f wattline.yaml`"
        elif code == "UNAVAILABLE" and "resolving" in text:
            text = f"{self.address}: this name is unknown; give the router's address as HOST:PORT"
        kind = RouterAway if code == "UNAVAILABLE" else CallError
        return kind(code=code, text=text or code)


def to_message(role: str, content: str) -> pb.Message:
    check_text(content)
    return pb.Message(role=role, content=content)


def check_text(text: str) -> None:
    """Raises CommandError for what a terminal or a file gave that is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CommandError("the text is not valid UTF-8; convert it, e.g. with `iconv`") from error


def to_delta(delta: pb.Delta) -> replies.Delta:
    return replies.Delta(
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        finish_reason=FINISH_REASONS.get(delta.finish_reason),
        logprobs=tuple(
            replies.TokenLogprobs(
                logprob=said.logprob, top=tuple((top.token_id, top.logprob) for top in said.top)
            )
            for said in delta.logprobs
        ),
        index=delta.index,
    )


def to_event(message: pb.GenerateResponse) -> replies.Delta | replies.Final:
    if message.WhichOneof("event") == "delta":
        return to_delta(message.delta)
    usage, timing = message.final.usage, message.final.timing
    return replies.Final(
        request_id=message.final.request_id,
        trace_id=message.final.trace_id,
        usage=replies.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            wasted_tokens=usage.wasted_tokens,
        ),
        timing=replies.Timing(
            queue_ms=timing.queue_ms,
            prefill_ms=timing.prefill_ms,
            decode_ms=timing.decode_ms,
            ttft_ms=timing.ttft_ms,
            total_ms=timing.total_ms,
        ),
        energy=to_energy(message.final.energy),
        resumed_at=tuple(message.final.resumed_at),
    )


def to_energy(energy: pb.Energy) -> replies.Energy:
    return replies.Energy(
        total_j=energy.total_j if energy.HasField("total_j") else None,
        prefill_j=energy.prefill_j if energy.HasField("prefill_j") else None,
        decode_j=energy.decode_j if energy.HasField("decode_j") else None,
        static_j=energy.static_j if energy.HasField("static_j") else None,
        joules_per_output_token=(
            energy.joules_per_output_token if energy.HasField("joules_per_output_token") else None
        ),
        joules_per_total_token=(
            energy.joules_per_total_token if energy.HasField("joules_per_total_token") else None
        ),
        source=energy.source,
        method=energy.method,
        window_ms=energy.window_ms,
        confidence_factor=energy.confidence_factor,
        is_final=energy.state == pb.ENERGY_STATE_FINAL,
        host_j=energy.host_j if energy.HasField("host_j") else None,
        host_source=energy.host_source,
    )
