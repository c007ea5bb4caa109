"""Copies go where they lower the busiest rank's load, the same on every rank, and stay where they are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.parallel.expert_placement import (
    Spares,
    holders,
    imbalance,
    keep_slots,
    no_spares,
    place_copies,
    rank_loads,
)


def test_the_hottest_expert_is_copied_to_the_idlest_rank() -> None:
    tokens = (80, 4, 8, 8)
    spares = place_copies(tokens, num_ranks=2, num_spare=1)
    assert spares == ((2,), (0,))
    assert holders(spares, num_experts=4) == [[0, 1], [0], [1, 0], [1]]
    assert rank_loads(tokens, spares) == [48, 52]
    assert imbalance(tokens, no_spares(2, 1)) == pytest.approx(1.68)
    assert imbalance(tokens, spares) == pytest.approx(1.04)


def test_an_even_load_needs_no_copies() -> None:
    assert place_copies((5, 5, 5, 5), num_ranks=2, num_spare=2) == no_spares(2, 2)
    assert place_copies((0, 0, 0, 0), num_ranks=2, num_spare=2) == no_spares(2, 2)
    assert imbalance((0, 0, 0, 0), no_spares(2, 0)) == 1.0


def test_one_expert_that_gets_all_is_copied_to_every_rank() -> None:
    spares = place_copies((0, 90, 0, 0, 0, 0), num_ranks=3, num_spare=1)
    assert spares == ((-1,), (1,), (1,))
    assert imbalance((0, 90, 0, 0, 0, 0), spares) == pytest.approx(1.0)


def test_a_copy_that_stays_keeps_its_slot() -> None:
    old: Spares = ((7, 5, -1), (1, 2, 3))
    assert keep_slots(old, ((5, 6, -1), (-1, -1, -1))) == ((6, 5, -1), (-1, -1, -1))
    assert keep_slots(old, ((4, 5, 7), (2, 9, -1))) == ((7, 5, 4), (9, 2, -1))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    num_ranks=st.integers(1, 4),
    num_home=st.integers(1, 4),
    num_spare=st.integers(0, 4),
    numbers=st.lists(st.integers(0, 1000), min_size=16, max_size=16),
    before=st.lists(st.integers(0, 1000), min_size=16, max_size=16),
)
def test_copies_never_make_it_worse(
    num_ranks: int, num_home: int, num_spare: int, numbers: list[int], before: list[int]
) -> None:
    num_experts = num_ranks * num_home
    tokens = numbers[:num_experts]
    spares = place_copies(tokens, num_ranks=num_ranks, num_spare=num_spare)
    assert imbalance(tokens, spares) <= imbalance(tokens, no_spares(num_ranks, 0)) + 1e-9
    assert sum(rank_loads(tokens, spares)) == pytest.approx(sum(tokens))
    for ranks in holders(spares, num_experts=num_experts):
        assert len(set(ranks)) == len(ranks), "no rank holds an expert twice"
    old = place_copies(before[:num_experts], num_ranks=num_ranks, num_spare=num_spare)
    kept = keep_slots(old, spares)
    assert [sorted(slots) for slots in kept] == [sorted(slots) for slots in spares]
    for old_slots, new_slots in zip(old, kept, strict=True):
        for was, now in zip(old_slots, new_slots, strict=True):
            assert was == now or was == -1 or was not in new_slots
