"""One request's life in the router, from a validated question to its joules. Start reading here.

    admit      refuse now what would fail later
    tokenise   off the event loop
    route      the replica that can start soonest
    submit     down the link; tokens come back step by step, text is made beside the event loop
    deliver    to the caller, as fast as it reads; where the replica is lost, the rest comes from another
    account    usage, timing, spans; joules when the replica's meter windows have closed

Whoever serves a protocol (gRPC here, others beside it) iterates `run` and writes what it yields. Cancelling
that iteration, at any point, frees everything: the engine is told within one message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from time import monotonic

from cluster.config import RouterSection
from cluster.link.engine_job import EngineJob
from cluster.link.replica_connection import ReplicaConnection, ReplicaState
from cluster.link.replica_pool import ReplicaPool
from cluster.link.token_stream import Finished
from cluster.router.admission import Verdict, decide
from cluster.router.answer import Completed, TextDelta
from cluster.router.bookkeeping import Books
from cluster.router.cache_salt import CacheSalts
from cluster.router.caller import Caller
from cluster.router.choices import choice_seed, deliver_choices
from cluster.router.completion import ChatPrompt, Completion, Prompt, TokenPrompt
from cluster.router.errors import (
    InvalidRequest,
    NoReplica,
    Overloaded,
    RouterError,
    SlowConsumer,
)
from cluster.router.resumption import Resumption
from cluster.router.run import Attempt, Run
from cluster.router.served_model import ServedModel
from cluster.router.validation import output_tokens_allowed
from cluster.telemetry import semconv
from cluster.text.answer_text import AnswerText
from replicas.request import FinishReason

MAX_DEFAULT_ENERGY_WAIT_S = 0.150
DEFAULT_ENERGY_WAIT_SHARE = 0.1
"""Of the time the answer took: a short answer is not held long for its joules."""
DEADLINE_MARGIN_S = 0.010
"""Left to bring the last message to a caller with a deadline."""
NOT_READY = "no replica of this model is attached and ready"
STOP_WAIT_S = 2.0
"""How long an engine may take to end a sequence whose answer is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes, and its size there."""

    connection: ReplicaConnection
    lane: int
    prompt_ids: tuple[int, ...]
    max_tokens: int


class Streams:
    """All requests under way. Owned by the event loop."""

    def __init__(
        self,
        *,
        section: RouterSection,
        models: Mapping[str, ServedModel],
        pool: ReplicaPool,
        tokenizing: Executor,
        books: Books,
        resumption: Resumption,
        salts: CacheSalts,
    ) -> None:
        self._section = section
        self._models = models
        self._pool = pool
        self._tokenizing = tokenizing
        self._books = books
        self._resumption = resumption
        self._salts = salts
        self.is_stopping = False
        """Set once: nothing new is admitted, what is under way goes on."""
        self.idle = asyncio.Event()
        """Set while nothing is under way."""
        self.idle.set()

    @property
    def in_flight(self) -> int:
        return sum(model.active_requests for model in self._models.values())

    async def run(
        self, completion: Completion, caller: Caller
    ) -> AsyncGenerator[TextDelta | Completed, None]:
        """Serve one request: text deltas, the last with a finish reason, then one `Completed`.

        Raises RouterError instead of `Completed` where the request fails.
        """
        model = self._models[completion.model]
        with caller.span.stage(semconv.ADMISSION):
            self._admit(model)
        with self._under_way(model):
            with caller.span.stage(semconv.TOKENIZE):
                prompt_ids = await self.tokenize(model, completion.prompt)
            self._resumption.admit(model.name, prompt_ids)
            with caller.span.stage(semconv.ROUTE):
                route = self._route(model, completion, prompt_ids)
            runs = [self._submit(model, completion, caller, route)]
            deltas = deliver_choices(
                runs,
                completion.num_choices,
                submit=lambda index: self._submit_beside(runs[0], completion, caller, route, index),
                deliver=lambda run: self._deliver(run, caller),
            )
            try:
                await caller.accept()
                async with aclosing(deltas):
                    async for delta in deltas:
                        yield delta
            except RouterError as error:
                for run in runs:
                    run.outcome = run.outcome or error
                raise
            finally:
                for run in runs:
                    run.release()
                closed = self._books.close(runs)
            await closed.account.wait(_energy_wait_s(completion, caller))
            yield Completed(
                request_id=caller.request_id,
                trace_id=caller.span.trace_id,
                usage=closed.usage,
                timing=closed.timing,
                energy=closed.account.energy,
                is_settled=closed.account.is_settled,
                attempts=max(len(run.attempts) for run in runs),
                resumed_at=tuple(offset for run in runs for offset in run.resumed_at),
            )

    async def tokenize(self, model: ServedModel, prompt: Prompt) -> tuple[int, ...]:
        """Tokens of a prompt. Raises InvalidRequest where the chat template refuses the conversation."""
        if isinstance(prompt, TokenPrompt):
            return prompt.ids
        loop = asyncio.get_running_loop()
        if not isinstance(prompt, ChatPrompt):
            return await loop.run_in_executor(self._tokenizing, model.tokenizer.encode, prompt.text)
        try:
            return await loop.run_in_executor(self._tokenizing, model.tokenizer.encode_chat, prompt.turns)
        except ValueError as error:
            raise InvalidRequest(
                field="messages", got="a conversation", limit=str(error), fix="change roles or their order"
            ) from error

    @contextmanager
    def _under_way(self, model: ServedModel) -> Iterator[None]:
        self.idle.clear()
        try:
            with model.one_more_active():
                yield
        finally:
            if self.in_flight == 0:
                self.idle.set()

    def _admit(self, model: ServedModel) -> None:
        decision = decide(
            is_stopping=self.is_stopping,
            in_flight=self.in_flight,
            max_streams=self._section.max_streams,
            lanes=self._pool.lanes(model.name),
        )
        if decision.verdict is Verdict.ADMIT:
            return
        model.refused_total += 1
        match decision.verdict:
            case Verdict.ROUTER_STOPPING:
                raise NoReplica("this router is stopping; use another")
            case Verdict.NO_REPLICA:
                raise NoReplica(NOT_READY)
            case Verdict.ROUTER_FULL:
                reason = f"{self._section.max_streams} streams are in flight, the router's limit"
            case _:
                reason = "all replicas of this model are full"
        raise Overloaded(reason, retry_after_ms=decision.retry_after_ms)

    def _route(self, model: ServedModel, completion: Completion, prompt_ids: tuple[int, ...]) -> Route:
        """Size the request and find it a place. Replicas of a model have one context; if not, the least."""
        contexts = [connection.hello.context_tokens for connection in self._pool.ready(model.name)]
        if not contexts:
            raise NoReplica(NOT_READY)
        max_tokens = output_tokens_allowed(
            completion,
            prompt_tokens=len(prompt_ids),
            context_tokens=min(contexts),
            max_output=model.bounds.max_output_tokens,
        )
        connection, lane = self._pool.choose(model.name, prompt_tokens=len(prompt_ids))
        return Route(connection=connection, lane=lane, prompt_ids=prompt_ids, max_tokens=max_tokens)

    def _submit_beside(
        self, first: Run, completion: Completion, caller: Caller, route: Route, index: int
    ) -> Run:
        """Begin another choice where the first is, since the prompt is cached there."""
        connection, lane = first.attempt.connection, first.attempt.lane
        if connection.state is ReplicaState.STALLED:
            connection, lane = self._pool.choose(first.model.name, prompt_tokens=len(route.prompt_ids))
        route = replace(route, connection=connection, lane=lane)
        return self._submit(first.model, completion, caller, route, index=index)

    def _submit(
        self, model: ServedModel, completion: Completion, caller: Caller, route: Route, *, index: int = 0
    ) -> Run:
        deadline_s = caller.deadline_s()
        span = caller.span.start_inference(
            completion, request_id=caller.request_id, max_tokens=route.max_tokens
        )
        ends = frozenset() if completion.ignore_eos else frozenset(route.connection.hello.eos_token_ids)
        stop_token_ids = completion.stop_token_ids | ends
        limit_bytes = self._section.stall_buffer_bytes
        job = EngineJob(
            prompt_ids=route.prompt_ids,
            sampling=replace(completion.sampling, seed=choice_seed(completion.sampling.seed, index)),
            max_tokens=route.max_tokens,
            stop_token_ids=stop_token_ids,
            priority=completion.priority,
            deadline_s=deadline_s,
            lane=route.lane,
            cache_salt=self._salts.of(caller.tenant),
            traceparent=span.traceparent,
            text=AnswerText(model.tokenizer, stop_texts=completion.stop_texts, stop_token_ids=stop_token_ids),
            buffer_bytes=limit_bytes // completion.num_choices,
            on_overflow=lambda: caller.interrupt(SlowConsumer(limit_bytes=limit_bytes)),
        )
        stream, account = route.connection.submit(job)
        attempt = Attempt(
            connection=route.connection,
            stream=stream,
            account=account,
            lane=route.lane,
            first_offset=0,
            prompt_tokens=len(route.prompt_ids),
        )
        return Run(
            request_id=caller.request_id,
            tenant=caller.tenant,
            arrived_s=caller.arrived_s,
            model=model,
            job=job,
            span=span,
            attempts=[attempt],
            index=index,
        )

    async def _deliver(self, run: Run, caller: Caller) -> AsyncGenerator[TextDelta, None]:
        """Deltas up to the one with the finish reason; then the engine's own end, which has the timing."""
        while run.outcome is None:
            batch = await run.attempt.stream.next()
            run.take(batch.token_ids)
            finish: FinishReason | None = None
            if batch.is_stopped:
                finish = FinishReason.STOP
            elif isinstance(batch.end, Finished):
                finish = batch.end.reason
            if finish or batch.text or batch.token_ids:
                yield TextDelta(batch.text, batch.token_ids, finish, batch.logprobs, run.index)
            run.outcome = finish
            if finish is not None or not isinstance(batch.end, RouterError):
                continue
            if run.has_all_tokens:
                run.outcome = FinishReason.LENGTH
                text = run.job.text.feed((), is_last=True).text
                yield TextDelta(text, (), run.outcome, index=run.index)
            else:
                await self._resumption.resume(run, caller, batch.end)
        await _await_end(run.attempt)


async def _await_end(attempt: Attempt) -> None:
    """The answer is complete: the engine ends the sequence, if it has not, and says what it took."""
    attempt.connection.stop(attempt.stream)
    try:
        async with asyncio.timeout(STOP_WAIT_S):
            end = await attempt.stream.wait_end()
    except TimeoutError:
        return
    if isinstance(end, Finished):
        attempt.timing = end.timing


def _energy_wait_s(completion: Completion, caller: Caller) -> float:
    """How long the last message may wait for final joules."""
    if completion.energy_wait_ms is None:
        elapsed_s = monotonic() - caller.arrived_s
        wait_s = min(MAX_DEFAULT_ENERGY_WAIT_S, DEFAULT_ENERGY_WAIT_SHARE * elapsed_s)
    else:
        wait_s = completion.energy_wait_ms / 1e3
    remaining_s = caller.time_remaining_s()
    return wait_s if remaining_s is None else min(wait_s, remaining_s - DEADLINE_MARGIN_S)
