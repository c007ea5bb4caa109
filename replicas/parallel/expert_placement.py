"""Which ranks hold which experts of a layer, and how evenly the work falls on them.

An expert lives at home: expert e of X on rank e // (X / ranks). A rank may hold copies of others in its spare
slots; the tokens of an expert with n copies go round robin, token t to copy t % n, home first and then by
rank. Example, 4 experts on 2 ranks with one spare slot each, and 80, 4, 8, 8 tokens: a copy of expert 0 on
rank 1 turns loads of 84 and 16 into 44 and 56, and a copy of expert 2 on rank 0 those into 48 and 52. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from replicas.expert_loads import EMPTY_SLOT

Spares = tuple[tuple[int, ...], ...]
"""Per rank, the expert in each of its spare slots, or EMPTY_SLOT."""


def no_spares(num_ranks: int, num_spare: int) -> Spares:
    return ((EMPTY_SLOT,) * num_spare,) * num_ranks


def holders(spares: Spares, *, num_experts: int) -> list[list[int]]:
    """The ranks that hold each expert: home first, then by rank."""
    num_home = num_experts // len(spares)
    ranks = [[expert // num_home] for expert in range(num_experts)]
    for rank, slots in enumerate(spares):
        for expert in slots:
            if expert != EMPTY_SLOT:
                ranks[expert].append(rank)
    return ranks


def rank_loads(tokens: Sequence[float], spares: Spares) -> list[float]:
    """Tokens that each rank runs, if copies share evenly."""
    loads = [0.0] * len(spares)
    for count, ranks in zip(tokens, holders(spares, num_experts=len(tokens)), strict=True):
        for rank in ranks:
            loads[rank] += count / len(ranks)
    return loads


def imbalance(tokens: Sequence[float], spares: Spares) -> float:
    """Load of the busiest rank over the mean: 1 is even, the number of ranks the worst. 1 without tokens."""
    loads = rank_loads(tokens, spares)
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def place_copies(tokens: Sequence[int], *, num_ranks: int, num_spare: int) -> Spares:
    """Copies for the spare slots: the hottest copy that can be relieved first, to the idlest rank without it.

    Greedy; a copy is made only where it lowers the higher of the two loads. Equals go by the lower number.
    """
    spares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = rank_loads(tokens, no_spares(num_ranks, 0))
    ranks_of = holders(no_spares(num_ranks, 0), num_experts=len(tokens))
    while (move := _best_move(tokens, loads, ranks_of, spares, num_spare)) is not None:
        expert, target = move
        old, new = tokens[expert] / len(ranks_of[expert]), tokens[expert] / (len(ranks_of[expert]) + 1)
        for rank in ranks_of[expert]:
            loads[rank] += new - old
        loads[target] += new
        ranks_of[expert].append(target)
        spares[target].append(expert)
    return tuple((*slots, *[EMPTY_SLOT] * (num_spare - len(slots))) for slots in map(sorted, spares))


def keep_slots(old: Spares, new: Spares) -> Spares:
    """`new`, with every copy that stays on its rank in the slot it has."""
    return tuple(_keep_slots(old_slots, new_slots) for old_slots, new_slots in zip(old, new, strict=True))


def _keep_slots(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    staying = set(old).intersection(new) - {EMPTY_SLOT}
    coming = iter([expert for expert in new if expert not in staying])
    return tuple(expert if expert in staying else next(coming) for expert in old)


def _best_move(
    tokens: Sequence[int],
    loads: list[float],
    ranks_of: list[list[int]],
    spares: list[list[int]],
    num_spare: int,
) -> tuple[int, int] | None:
    """(expert, rank) of the next copy; None when no copy helps or no slot is left."""
    hottest_first = sorted(
        range(len(tokens)), key=lambda expert: (-tokens[expert] / len(ranks_of[expert]), expert)
    )
    for expert in hottest_first:
        open_ranks = [
            rank
            for rank, slots in enumerate(spares)
            if len(slots) < num_spare and rank not in ranks_of[expert]
        ]
        if not open_ranks:
            continue
        target = min(open_ranks, key=lambda rank: (loads[rank], rank))
        relieved = max(loads[rank] for rank in ranks_of[expert])
        if loads[target] + tokens[expert] / (len(ranks_of[expert]) + 1) < relieved:
            return expert, target
    return None
