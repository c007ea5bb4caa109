"""Requests that go on where another router's stream ended: their token, their seed, and their place.

The decision is in `resume_token.py`; here are the replicas it may be about.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from cluster.link.replica_pool import ReplicaPool
from cluster.request.answer import TextDelta
from cluster.request.completion import Completion, Resume
from cluster.request.errors import Overloaded, ResumeRefused
from cluster.request.failover import ReplicaIdentity
from cluster.request.resume_token import ResumeSeal, digest_identity, digest_question
from cluster.router.caller import Caller
from cluster.router.order import Order
from cluster.router.route_finder import Place
from cluster.router.run import Run
from cluster.router.suspicion import Standing
from cluster.router.turns import Turns
from cluster.served_model import ServedModel
from replicas.supervisor.in_flight import PROOF_TOKENS

FULL_RETRY_MS = 250


class AnswerTokens:
    """The tokens of one answer: another one whenever there is more to say. Mutable; owned by its stream."""

    def __init__(self, seal: Callable[[int], bytes]) -> None:
        self._seal = seal
        self._told_deaths: int | None = None

    def put_on(self, delta: TextDelta, *, num_deaths: int) -> TextDelta | None:
        """The delta, with a token where its caller has none that knows of these deaths. None: it is empty."""
        if num_deaths != self._told_deaths:
            self._told_deaths = num_deaths
            if token := self._seal(num_deaths):
                return replace(delta, resume_token=token)
        return None if delta.is_empty else delta


class Continuations:
    """One per router. Holds no state of any stream."""

    def __init__(self, *, seal: ResumeSeal, pool: ReplicaPool, turns: Turns) -> None:
        self._seal = seal
        self._pool = pool
        self._turns = turns

    def tokens(
        self, completion: Completion, prompt_ids: tuple[int, ...], identity: ReplicaIdentity, *, tenant: str
    ) -> AnswerTokens:
        """Empty ones for several choices, which cannot go on."""
        if completion.num_choices > 1:
            return AnswerTokens(lambda _: b"")
        question = digest_question(completion, prompt_ids, tenant=tenant)
        seed = completion.sampling.seed
        return AnswerTokens(partial(self._seal.seal, seed=seed, question=question, identity=identity))

    def recall(self, completion: Completion, prompt_ids: tuple[int, ...], *, tenant: str) -> Completion:
        """The completion with the seed it had. Raises ResumeRefused."""
        resume = completion.resume
        if resume is None:
            return completion
        question = digest_question(completion, prompt_ids, tenant=tenant)
        claims = self._seal.open(resume.token, question=question)
        return replace(
            completion,
            sampling=replace(completion.sampling, seed=claims.seed),
            resume=replace(resume, identity=claims.identity, num_deaths=claims.num_deaths),
        )

    @asynccontextmanager
    async def place(
        self, model: ServedModel, resume: Resume, order: Order, caller: Caller
    ) -> AsyncIterator[Place]:
        """A replica with the weights that began the answer, once it is its turn there; held inside.

        Raises ResumeRefused, Overloaded, DeadlinePassed.
        """
        tokens_left = order.max_tokens - len(resume.token_ids)
        if tokens_left <= 0:
            raise ResumeRefused(f"the answer has its {order.max_tokens} tokens; nothing is left to resume")
        alike = [
            connection.identity
            for connection in self._pool.ready(model.name)
            if digest_identity(connection.identity) == resume.identity
        ]
        if not alike:
            raise ResumeRefused(
                "no replica has the weights that began this answer any more; start over without the token"
            )
        context_tokens = len(order.prompt_ids) + order.max_tokens
        errand = replace(
            order.errand,
            prompt_ids=(*order.prompt_ids, *resume.token_ids),
            output_tokens=model.output_estimate.tokens(max_tokens=tokens_left),
        )
        standing = standing_at_return(resume)
        place = await self._turns.find(
            model.section,
            errand,
            standing=standing,
            caller=caller,
            identity=alike[0],
            accepts=lambda one: one.hello.context_tokens >= context_tokens,
            wait_s=0.0,
        )
        if place is None:
            raise Overloaded("all replicas of this model are full", retry_after_ms=FULL_RETRY_MS)
        with self._turns.hold(place.connection, standing):
            yield place

    def enter(self, run: Run, resume: Resume) -> None:
        """It goes on here, with what its token holds against it."""
        run.standing = standing_at_return(resume)
        self._turns.join(run.attempt, run.standing)


def standing_at_return(resume: Resume) -> Standing:
    """How many tokens its last replica gave is not known: at most those that its caller has."""
    outlives_tokens = len(resume.token_ids) + PROOF_TOKENS
    return Standing(num_deaths=resume.num_deaths, outlives_tokens=outlives_tokens)
