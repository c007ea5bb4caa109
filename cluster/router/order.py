"""A request once its prompt is tokens: its size, what it is expected to take, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.link.replica_connection import ReplicaConnection
from cluster.request.completion import Completion
from cluster.request.validation import output_tokens_allowed
from cluster.router.route_finder import Errand, Place
from cluster.served_model import ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """`errand` is one choice of it; all have the same prompt and the same room for an answer."""

    errand: Errand
    prompt_ids: tuple[int, ...]
    max_tokens: int
    num_choices: int
    priority: int

    @property
    def expected_tokens(self) -> int:
        """Prompt and answers: what the tenant is charged until the answers are there."""
        return len(self.prompt_ids) + self.num_choices * self.errand.output_tokens

    def expected_mj(self, model: ServedModel) -> int:
        """By what the model's last answers took; 0 while nothing is known."""
        joules = model.energy_rate.joules_per_output_token
        return 0 if joules is None else round(joules * 1e3 * self.num_choices * self.errand.output_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """An order and the lane for one choice of it. `place` None: where another choice is, unasked."""

    order: Order
    connection: ReplicaConnection
    lane: int
    cached_tokens: int
    place: Place | None

    def beside(self, connection: ReplicaConnection, lane: int) -> Route:
        """Another choice, where the first is: all of the prompt but its last token is cached there."""
        cached_tokens = len(self.order.prompt_ids) - 1
        return replace(self, connection=connection, lane=lane, cached_tokens=cached_tokens, place=None)


def size_order(
    completion: Completion,
    model: ServedModel,
    prompt_ids: tuple[int, ...],
    *,
    priority_max: int,
    cache_salt: bytes,
    context_tokens: int,
) -> Order:
    """Raises InvalidRequest for a prompt that leaves no room for an answer."""
    max_tokens = output_tokens_allowed(
        completion,
        prompt_tokens=len(prompt_ids),
        context_tokens=context_tokens,
        max_output=model.bounds.max_output_tokens,
    )
    errand = Errand(
        prompt_ids=prompt_ids,
        output_tokens=model.output_estimate.tokens(max_tokens=max_tokens),
        cache_salt=cache_salt,
        session_id=completion.session_id,
    )
    return Order(
        errand=errand,
        prompt_ids=prompt_ids,
        max_tokens=max_tokens,
        num_choices=completion.num_choices,
        priority=min(completion.priority, priority_max),
    )


def route_to(place: Place, order: Order) -> Route:
    return Route(
        order=order,
        connection=place.connection,
        lane=place.lane,
        cached_tokens=place.cached_tokens,
        place=place,
    )
