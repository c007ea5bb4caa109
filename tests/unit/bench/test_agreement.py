"""First tokens of two engines: the same, another choice at a tie, or different."""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers.agreement import Agreement, compare_heads


def test_a_difference_is_judged_at_its_first_token_by_the_gap_of_the_logits() -> None:
    asked: list[tuple[list[int], int, int]] = []

    def gap(tokens: Sequence[int], one: int, other: int) -> float:
        asked.append((list(tokens), one, other))
        return -1e-4 if one == 5 else 0.3

    agreement = compare_heads(
        prompts=[(1, 2), (1, 3), (1, 4)],
        ours=[(9, 9), (8, 5), (7, 7)],
        theirs=[(9, 9), (8, 6), (6, 7)],
        gap=gap,
    )
    assert agreement == Agreement(same=1, near_ties=1, different=1, widest_gap=0.3)
    assert asked == [([1, 3, 8], 5, 6), ([1, 4], 7, 6)]
