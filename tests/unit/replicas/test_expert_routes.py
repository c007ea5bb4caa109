"""A token's choice finds the slot of its copy; every choice is served by exactly one rank."""

from __future__ import annotations

import torch

from replicas.layers.expert_routes import ExpertRoutes
from replicas.parallel.expert_placement import Spares, holders


def make_routes(spares: Spares, rank: int, *, num_experts: int) -> ExpertRoutes:
    num_home = num_experts // len(spares)
    routes = ExpertRoutes.empty(
        num_experts=num_experts,
        num_ranks=len(spares),
        num_slots=num_home + len(spares[rank]),
        device=torch.device("cpu"),
    )
    own = {rank * num_home + slot: slot for slot in range(num_home)}
    own |= {expert: num_home + slot for slot, expert in enumerate(spares[rank]) if expert >= 0}
    routes.set(holders(spares, num_experts=num_experts), own, rank=rank)
    return routes


def test_tokens_take_turns_among_the_copies() -> None:
    spares = ((2,), (0,))
    choices_TC = torch.tensor([[0, 3], [0, 2], [2, 1], [3, 2]])
    first, second = (make_routes(spares, rank, num_experts=4) for rank in (0, 1))
    assert first.slots_of(choices_TC).tolist() == [[0, 3], [3, 2], [3, 1], [3, 2]]
    assert second.slots_of(choices_TC).tolist() == [[3, 1], [2, 3], [0, 3], [1, 3]]


def test_every_choice_is_served_once_before_and_after_a_move() -> None:
    choices_TC = torch.randint(0, 6, (50, 2), generator=torch.Generator().manual_seed(0))
    for spares in (((-1, -1),) * 3, ((5, 2), (0, 4), (-1, 0))):
        slots = [make_routes(spares, rank, num_experts=6).slots_of(choices_TC) for rank in range(3)]
        assert torch.stack(slots).ne(4).sum(dim=0).eq(1).all()
