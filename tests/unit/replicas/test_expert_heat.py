"""The heat map of experts: shares of an even load, folded to a bounded size, and merged over replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicas.expert_heat import MAX_CELLS, ExpertHeat, heat_of, merge_heat
from replicas.expert_loads import ExpertLoads

LOADS = ExpertLoads(num_experts=4, tokens=(80, 4, 8, 8, 5, 5, 5, 5), num_ranks=2, spares=(-1, 0, -1, -1))


def make_heat(loads: ExpertLoads = LOADS) -> ExpertHeat:
    heat = heat_of(loads, loads.tokens)
    assert heat is not None
    return heat


def test_cells_are_percent_of_an_even_share_and_copies_are_marked() -> None:
    heat = make_heat()
    assert heat.load_percent == (320, 16, 32, 32, 100, 100, 100, 100)
    assert (heat.num_rows, heat.num_columns, heat.copied_cells, heat.num_copies) == (2, 4, (0,), 1)
    assert heat.hottest == (3.2, 0, 0)
    assert (heat.imbalance, heat.imbalance_without_copies) == pytest.approx((1.06, 1.34))


def test_one_rank_has_nothing_to_balance_and_no_work_has_no_map() -> None:
    alone = ExpertLoads(num_experts=2, tokens=(3, 1))
    assert make_heat(alone).imbalance is None
    assert heat_of(alone, (0.0, 0.0)) is None


def test_a_huge_model_is_folded_and_its_hottest_expert_is_not_hidden() -> None:
    num_layers, num_experts = 100, 300
    tokens = [1] * num_layers * num_experts
    tokens[7 * num_experts + 299] = 1000
    heat = make_heat(ExpertLoads(num_experts=num_experts, tokens=tuple(tokens)))
    assert (heat.layers_per_row, heat.experts_per_column) == (2, 5)
    assert (heat.num_rows, heat.num_columns) == (50, 60)
    assert max(heat.num_rows, heat.num_columns) <= MAX_CELLS
    load, layer, expert = heat.hottest
    assert (layer, expert) == (6, 295)
    assert load == pytest.approx(1001 * 300 / (2 * 300 + 999), abs=0.01)


def test_replicas_weigh_as_their_tokens_and_the_most_uneven_speaks() -> None:
    heat = make_heat()
    even = replace(heat, load_percent=(100,) * 8, copied_cells=(5,), tokens=heat.tokens * 3, imbalance=1.0)
    other_model = replace(heat, num_layers=1, load_percent=(1, 2, 3, 4), copied_cells=(), imbalance=9.0)
    merged = merge_heat([heat, even, other_model])
    assert merged is not None
    assert merged.load_percent == (155, 79, 83, 83, 100, 100, 100, 100)
    assert (merged.imbalance, merged.copied_cells) == (1.06, (0, 5))
    assert merge_heat([]) is None
    assert merge_heat([heat]) is heat


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"load_percent": (1, 2)}, "2 cells in a heat map of 2 x 4"),
        ({"num_experts": 0}, "folds of at least 1"),
        ({"num_layers": 1000, "load_percent": (0,) * 4000}, "1000 x 4 cells; 64 is the limit"),
        ({"copied_cells": (8,)}, "does not have"),
        ({"tokens": float("nan")}, "nan tokens"),
    ],
)
def test_a_map_that_cannot_be_is_refused(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        replace(make_heat(), **fields)  # type: ignore[arg-type]
