"""How experts were loaded of late, small enough to draw: a map of layers by experts, and how even ranks are.

A model may have thousands of experts, a picture has at most MAX_CELLS cells a side: beyond that a row adds up
neighbouring layers, and a column shows the hottest of neighbouring experts, so that folding hides no hot one.
Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from replicas.expert_loads import EMPTY_SLOT, ExpertLoads
from replicas.parallel.expert_placement import imbalance, no_spares

MAX_CELLS = 64
"""Of a row, and of a column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertHeat:
    """`load_percent`, row by row: load of a cell in percent of an even share; 100 is even, 0 unused.

    `tokens`: counted with their choices over all layers; the weight of this map beside others.
    `copied_cells`: those that hold an expert with a copy in a spare slot. Imbalance: busiest rank over the
    mean, mean of the layers, as it is and had no expert a copy; None on one rank.
    """

    num_layers: int
    num_experts: int
    layers_per_row: int
    experts_per_column: int
    load_percent: tuple[int, ...]
    copied_cells: tuple[int, ...]
    tokens: float
    num_ranks: int
    num_copies: int
    imbalance: float | None
    imbalance_without_copies: float | None

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_experts, self.layers_per_row, self.experts_per_column) < 1:
            raise ValueError("a heat map has layers, experts, and folds of at least 1")
        if max(self.num_rows, self.num_columns) > MAX_CELLS:
            raise ValueError(
                f"a heat map of {self.num_rows} x {self.num_columns} cells; {MAX_CELLS} is the limit"
            )
        if len(self.load_percent) != self.num_rows * self.num_columns:
            raise ValueError(
                f"{len(self.load_percent)} cells in a heat map of {self.num_rows} x {self.num_columns}"
            )
        if any(cell >= len(self.load_percent) for cell in self.copied_cells):
            raise ValueError("a heat map names a cell with a copy that it does not have")
        if not isfinite(self.tokens) or self.tokens < 0:
            raise ValueError(f"a heat map of {self.tokens} tokens")

    @property
    def num_rows(self) -> int:
        return -(-self.num_layers // self.layers_per_row)

    @property
    def num_columns(self) -> int:
        return -(-self.num_experts // self.experts_per_column)

    @property
    def hottest(self) -> tuple[float, int, int]:
        """The hottest cell: its load over an even share, its first layer, its first expert."""
        percent = max(self.load_percent)
        row, column = divmod(self.load_percent.index(percent), self.num_columns)
        return percent / 100, row * self.layers_per_row, column * self.experts_per_column


def heat_of(loads: ExpertLoads, recent: Sequence[float]) -> ExpertHeat | None:
    """`recent`: tokens of `loads` weighed by their age, layer by layer as there. None: there were none.

    Example, 2 layers of 4 experts with 8, 0, 0, 0 and 2, 2, 2, 2: cells 400 0 0 0, 100 100 100 100.
    """
    if sum(recent) <= 0.0:
        return None
    num_experts, num_layers = loads.num_experts, loads.num_layers
    layers_per_row, experts_per_column = -(-num_layers // MAX_CELLS), -(-num_experts // MAX_CELLS)
    layers = [recent[first : first + num_experts] for first in range(0, len(recent), num_experts)]
    cells: list[int] = []
    for first in range(0, num_layers, layers_per_row):
        cells += _row(layers[first : first + layers_per_row], experts_per_column)
    num_columns = -(-num_experts // experts_per_column)
    copies = [
        (layer, expert)
        for layer in range(num_layers)
        for slots in loads.layer_spares(layer)
        for expert in slots
        if expert != EMPTY_SLOT
    ]
    copied = {
        layer // layers_per_row * num_columns + expert // experts_per_column for layer, expert in copies
    }
    now, bare = _imbalances(loads, layers)
    return ExpertHeat(
        num_layers=num_layers,
        num_experts=num_experts,
        layers_per_row=layers_per_row,
        experts_per_column=experts_per_column,
        load_percent=tuple(cells),
        copied_cells=tuple(sorted(copied)),
        tokens=sum(recent),
        num_ranks=loads.num_ranks,
        num_copies=len(copies),
        imbalance=now,
        imbalance_without_copies=bare,
    )


def merge_heat(heats: Sequence[ExpertHeat]) -> ExpertHeat | None:
    """One map for replicas of one model, weighed by their tokens; the imbalance is that of the most uneven.

    A map of another shape than the first is left out: that replica has another version of the model.
    """
    if len(heats) < 2:
        return heats[0] if heats else None
    shape = _shape(heats[0])
    alike = [heat for heat in heats if _shape(heat) == shape]
    tokens = sum(heat.tokens for heat in alike)
    weights = [heat.tokens / tokens if tokens else 1 / len(alike) for heat in alike]
    worst = max(alike, key=lambda heat: heat.imbalance or 0.0)
    return ExpertHeat(
        num_layers=worst.num_layers,
        num_experts=worst.num_experts,
        layers_per_row=worst.layers_per_row,
        experts_per_column=worst.experts_per_column,
        load_percent=tuple(
            round(sum(weight * value for weight, value in zip(weights, values, strict=True)))
            for values in zip(*(heat.load_percent for heat in alike), strict=True)
        ),
        copied_cells=tuple(sorted({cell for heat in alike for cell in heat.copied_cells})),
        tokens=tokens,
        num_ranks=worst.num_ranks,
        num_copies=worst.num_copies,
        imbalance=worst.imbalance,
        imbalance_without_copies=worst.imbalance_without_copies,
    )


def _row(layers: Sequence[Sequence[float]], experts_per_column: int) -> list[int]:
    sums = [sum(of_expert) for of_expert in zip(*layers, strict=True)]
    total = sum(sums)
    if total <= 0.0:
        return [0] * -(-len(sums) // experts_per_column)
    scale = 100.0 * len(sums) / total
    return [
        round(scale * max(sums[first : first + experts_per_column]))
        for first in range(0, len(sums), experts_per_column)
    ]


def _imbalances(loads: ExpertLoads, layers: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Means over the layers that ran: every layer runs the same tokens, so they weigh the same."""
    if loads.num_ranks < 2:
        return None, None
    bare_spares = no_spares(loads.num_ranks, 0)
    now = [imbalance(recent, loads.layer_spares(layer)) for layer, recent in enumerate(layers)]
    bare = [imbalance(recent, bare_spares) for recent in layers]
    return sum(now) / len(now), sum(bare) / len(bare)


def _shape(heat: ExpertHeat) -> tuple[int, ...]:
    return heat.num_layers, heat.num_experts, heat.layers_per_row, heat.experts_per_column
