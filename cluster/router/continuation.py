"""Requests that go on where another router's stream ended: their token, their seed, and their place.

The decision is in `resume_token.py`; here are the replicas it may be about.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.link.replica_pool import ReplicaPool
from cluster.request.completion import Completion
from cluster.request.errors import Overloaded, ResumeRefused
from cluster.request.failover import ReplicaIdentity
from cluster.request.resume_token import ResumeSeal, digest_identity, digest_question
from cluster.router.order import Order
from cluster.router.route_finder import Place, RouteFinder
from cluster.served_model import ServedModel

FULL_RETRY_MS = 250


class Continuations:
    """One per router. Holds no state of any stream."""

    def __init__(self, *, seal: ResumeSeal, pool: ReplicaPool, finder: RouteFinder) -> None:
        self._seal = seal
        self._pool = pool
        self._finder = finder

    def token(
        self, completion: Completion, prompt_ids: tuple[int, ...], identity: ReplicaIdentity, *, tenant: str
    ) -> bytes:
        """What the first delta carries; empty for several choices, which cannot go on."""
        if completion.num_choices > 1:
            return b""
        question = digest_question(completion, prompt_ids, tenant=tenant)
        return self._seal.seal(seed=completion.sampling.seed, question=question, identity=identity)

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
            resume=replace(resume, identity=claims.identity),
        )

    def place(self, model: ServedModel, completion: Completion, order: Order) -> Place:
        """A replica with the weights that began the answer. Raises ResumeRefused, Overloaded."""
        resume = completion.resume
        assert resume is not None
        tokens_left = order.max_tokens - len(resume.token_ids)
        if tokens_left <= 0:
            raise ResumeRefused(f"the answer has its {order.max_tokens} tokens; nothing is left to resume")
        alike = [
            connection.identity
            for connection in self._pool.ready(completion.model)
            if digest_identity(connection.identity) == resume.identity
        ]
        if not alike:
            raise ResumeRefused(
                "no replica has the weights that began this answer any more; start over without the token"
            )
        context_tokens = len(order.prompt_ids) + order.max_tokens
        place = self._finder.find(
            model.section,
            replace(
                order.errand,
                prompt_ids=(*order.prompt_ids, *resume.token_ids),
                output_tokens=model.output_estimate.tokens(max_tokens=tokens_left),
            ),
            identity=alike[0],
            accepts=lambda one: one.hello.context_tokens >= context_tokens,
        )
        if place is None:
            raise Overloaded("all replicas of this model are full", retry_after_ms=FULL_RETRY_MS)
        return place
