"""One request's life in the router, from a validated question to its joules. Start reading here.

    admit      refuse now what would fail later
    tokenise   off the event loop, unless the prompt is short
    route      at once, or after a wait in the model's queue, to the replica that suits it best
    submit     down the link; tokens come back step by step, text is made beside the event loop
    deliver    to the caller, as fast as it reads; where the replica is lost, the rest comes from another
    account    usage, timing, spans; joules when the replica's meter windows have closed

Whoever serves a protocol (gRPC here, others beside it) iterates `run` and writes what it yields. Cancelling
that iteration, at any point, frees everything: the engine is told within one message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from time import monotonic

from cluster.admission.decision import Arrival, Verdict, decide_arrival
from cluster.admission.tenant import Tenant
from cluster.admission.tenant_account import TenantAccount
from cluster.admission.tenants import Charge, Tenants
from cluster.config import RouterSection
from cluster.link.replica_connection import ReplicaState
from cluster.link.replica_pool import ReplicaPool
from cluster.link.token_stream import Finished
from cluster.request.answer import Completed, TextDelta
from cluster.request.completion import ChatPrompt, Completion, Prompt, TokenPrompt
from cluster.request.errors import DeadlinePassed, InvalidRequest, NoReplica, RouterError
from cluster.router.bookkeeping import Books, ClosedBooks
from cluster.router.caller import Caller
from cluster.router.choices import deliver_choices
from cluster.router.continuation import Continuations
from cluster.router.gate import Gate
from cluster.router.order import Order, Route, route_to, size_order
from cluster.router.refusal import Refusals
from cluster.router.resumption import Resumption
from cluster.router.route_finder import Place
from cluster.router.run import Attempt, Run
from cluster.router.submission import Submission, new_text
from cluster.router.way_in import WayIn
from cluster.security.cache_salt import CacheSalts
from cluster.served_model import ServedModel
from cluster.telemetry import semconv
from cluster.text.text_threads import TextThreads, prompt_size
from replicas.request import FinishReason

MAX_DEFAULT_ENERGY_WAIT_S = 0.150
DEFAULT_ENERGY_WAIT_SHARE = 0.1
"""Of the time the answer took: a short answer is not held long for its joules."""
DEADLINE_MARGIN_S = 0.010
"""Left to bring the last message to a caller with a deadline."""
LATE_S = 0.05
"""A caller's own clock ends a call a moment before ours does."""
NOT_READY = "no replica of this model is attached and ready"
STOP_WAIT_S = 2.0
"""How long an engine may take to end a sequence whose answer is complete."""


class Streams:
    """All requests under way. Owned by the event loop."""

    def __init__(
        self,
        *,
        section: RouterSection,
        models: Mapping[str, ServedModel],
        pool: ReplicaPool,
        gates: Mapping[str, Gate],
        tenants: Tenants,
        threads: TextThreads,
        books: Books,
        resumption: Resumption,
        salts: CacheSalts,
        continuations: Continuations,
        refusals: Refusals,
        clock_s: Callable[[], float] = monotonic,
    ) -> None:
        self._refusals = refusals
        self._section = section
        self._models = models
        self._pool = pool
        self._gates = gates
        self._tenants = tenants
        self._threads = threads
        self._books = books
        self._resumption = resumption
        self._salts = salts
        self._continuations = continuations
        self._submission = Submission(section=section, threads=threads)
        self._clock_s = clock_s
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
        account = self._tenants.account(caller.tenant)
        way_in = WayIn(model=model, caller=caller)
        with self._counted(way_in, account), caller.span.stage(semconv.ADMISSION):
            await self._tenants.lease_joules(account)
            self._admit(way_in, account)
        with self._under_way(model), self._tenants.charging(account) as charge:
            with self._counted(way_in, account, is_last=True):
                completion, prompt_ids = await self._read(way_in, completion)
                with caller.span.stage(semconv.ROUTE):
                    order = self._size(model, completion, caller, charge.tenant, prompt_ids)
                    charge.expect(tokens=order.expected_tokens, energy_mj=order.expected_mj(model))
                    route, run = await self._begin(way_in, completion, charge.tenant, order)
            runs = [run]
            deltas = deliver_choices(
                runs,
                completion.num_choices,
                submit=lambda index: self._submit_beside(runs[0], completion, route, index),
                deliver=lambda run: self._deliver(run, caller),
            )
            try:
                await _accept(caller)
                tokens = self._continuations.tokens(
                    completion, prompt_ids, route.connection.identity, tenant=caller.tenant
                )
                async with aclosing(deltas):
                    async for delta in deltas:
                        if told := tokens.put_on(delta, num_deaths=run.standing.num_deaths):
                            yield told
            except (RouterError, asyncio.CancelledError, GeneratorExit) as error:
                for run in runs:
                    run.outcome = run.outcome or _end_of(error, caller)
                raise
            finally:
                for run in runs:
                    run.release()
                closed = self._books.close(runs)
                self._settle(model, charge, order, closed)
            await closed.account.wait(_energy_wait_s(completion, caller, now_s=self._clock_s()))
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
        tokenizer, size = model.tokenizer, prompt_size(prompt)
        if not isinstance(prompt, ChatPrompt):
            return await self._threads.run(partial(tokenizer.encode, prompt.text), size=size)
        try:
            return await self._threads.run(partial(tokenizer.encode_chat, prompt.turns), size=size)
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

    async def _read(self, way_in: WayIn, completion: Completion) -> tuple[Completion, tuple[int, ...]]:
        """The completion as it has to be drawn, and its prompt. Raises Quarantined, ResumeRefused."""
        model, caller = way_in.model, way_in.caller
        with caller.span.stage(semconv.TOKENIZE):
            prompt_ids = await self.tokenize(model, completion.prompt)
        self._resumption.check(model.name, prompt_ids)
        return self._continuations.recall(completion, prompt_ids, tenant=caller.tenant), prompt_ids

    @contextmanager
    def _counted(self, way_in: WayIn, account: TenantAccount, *, is_last: bool = False) -> Iterator[None]:
        """Count whatever ends the request inside; behind the last hurdle, count an admission else."""
        tenant = self._tenants.label(account.tenant.name)
        try:
            yield
        except (RouterError, asyncio.CancelledError) as error:
            self._books.count_unserved(way_in, _end_of(error, way_in.caller), tenant=tenant)
            raise
        if is_last:
            self._books.count_admission(way_in.model, tenant=tenant)
            self._resumption.count_admission()

    def _admit(self, way_in: WayIn, account: TenantAccount) -> None:
        """Refuse what need not be tokenised to know that it cannot be served now."""
        arrival = Arrival(
            is_stopping=self.is_stopping,
            in_flight=self.in_flight,
            max_streams=self._section.max_streams,
            has_replica=bool(self._pool.ready(way_in.model.name)),
            tenant_limit=account.limit_hit(now_s=self._clock_s()),
        )
        way_in.arrival = arrival
        decision = decide_arrival(arrival)
        if decision.verdict is not Verdict.ADMIT:
            raise self._refusals.of(decision, tenant=account.tenant.name)

    def _size(
        self,
        model: ServedModel,
        completion: Completion,
        caller: Caller,
        tenant: Tenant,
        prompt_ids: tuple[int, ...],
    ) -> Order:
        """Replicas of a model have one context; if not, the least counts."""
        contexts = [connection.hello.context_tokens for connection in self._pool.ready(model.name)]
        if not contexts:
            raise NoReplica(NOT_READY)
        return size_order(
            completion,
            model,
            prompt_ids,
            priority_max=tenant.priority_max,
            cache_salt=self._salts.of(caller.tenant),
            context_tokens=min(contexts),
        )

    def _settle(self, model: ServedModel, charge: Charge, order: Order, closed: ClosedBooks) -> None:
        """The tenant pays for what the request took, not for what was expected of it."""
        usage = closed.usage
        charge.settle(tokens=usage.prompt_tokens + usage.completion_tokens, energy=closed.account)
        self._gates[model.name].correct(
            charge.tenant,
            order.errand,
            uncached_tokens=usage.prompt_tokens - usage.cached_tokens,
            output_tokens=usage.completion_tokens,
        )

    async def _begin(
        self, way_in: WayIn, completion: Completion, tenant: Tenant, order: Order
    ) -> tuple[Route, Run]:
        """Wait for a place, and submit the first choice there."""
        way_in.since_s = self._clock_s()
        async with self._place(way_in, completion, tenant, order) as place:
            route = route_to(place, order)
            text = await self._submission.text_so_far(way_in.model, completion, route)
            run = self._submission.submit(way_in, completion, route, text)
            if completion.resume:
                self._continuations.enter(run, completion.resume)
                self._gates[way_in.model.name].count(tenant, order.errand)
            way_in.queued_s = way_in.waited_s(now_s=self._clock_s())
            return route, run

    @asynccontextmanager
    async def _place(
        self, way_in: WayIn, completion: Completion, tenant: Tenant, order: Order
    ) -> AsyncIterator[Place]:
        """In turn; an answer that goes on was in turn before, and needs the weights it began with."""
        if completion.resume:
            resumed = self._continuations.place(way_in.model, completion.resume, order, way_in.caller)
            async with resumed as place:
                yield place
            return
        gate, deadline_s = self._gates[way_in.model.name], way_in.caller.deadline_s()
        async with gate.place(
            order.errand,
            tenant=tenant,
            priority=order.priority,
            deadline_s=deadline_s,
            asked=way_in.note_wait,
        ) as place:
            yield place

    async def _submit_beside(self, first: Run, completion: Completion, route: Route, index: int) -> Run:
        """Begin another choice where the first is, since the prompt is cached there; else where it may go."""
        connection, lane = first.attempt.connection, first.attempt.lane
        beside = route.beside(connection, lane)
        if connection.state is ReplicaState.STALLED:
            beside = route_to(await self._resumption.place_beside(first, route.order.errand), route.order)
        text = new_text(first.model, completion, beside)
        return self._submission.submit(first.way_in, completion, beside, text, index=index)

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
                yield TextDelta(
                    batch.text, batch.token_ids, finish, batch.logprobs, run.index, batch.prompt_logprobs
                )
            run.outcome = finish
            if finish is not None or not isinstance(batch.end, RouterError):
                continue
            if run.has_all_tokens:
                run.outcome = FinishReason.LENGTH
                text = run.job.text.feed((), is_last=True).text
                yield TextDelta(text, (), run.outcome, index=run.index)
            else:
                self._resumption.lose(run, batch.end)
                yield TextDelta("", (), None, index=run.index)  # Its token says what is held against it now.
                await self._resumption.resume(run, caller, batch.end)
        await _await_end(run.attempt)


def _end_of(error: BaseException, caller: Caller) -> RouterError | None:
    """Why a request was cut short; None: its caller gave it up before its deadline."""
    if isinstance(error, RouterError):
        return error
    remaining_s = caller.time_remaining_s()
    return DeadlinePassed() if remaining_s is not None and remaining_s <= LATE_S else None


async def _accept(caller: Caller) -> None:
    """The submission leaves first: the task that writes it to the link is woken, and runs at the pause."""
    await asyncio.sleep(0)
    await caller.accept()


async def _await_end(attempt: Attempt) -> None:
    """The answer is complete: the engine ends the sequence, if it has not, and says what it took."""
    attempt.is_over = True
    attempt.connection.stop(attempt.stream)
    with suppress(TimeoutError):
        async with asyncio.timeout(STOP_WAIT_S):
            await attempt.stream.wait_end()


def _energy_wait_s(completion: Completion, caller: Caller, *, now_s: float) -> float:
    """How long the last message may wait for final joules."""
    if completion.energy_wait_ms is None:
        elapsed_s = now_s - caller.arrived_s
        wait_s = min(MAX_DEFAULT_ENERGY_WAIT_S, DEFAULT_ENERGY_WAIT_SHARE * elapsed_s)
    else:
        wait_s = completion.energy_wait_ms / 1e3
    remaining_s = caller.time_remaining_s()
    return wait_s if remaining_s is None else min(wait_s, remaining_s - DEADLINE_MARGIN_S)
