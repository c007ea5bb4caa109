"""The experts of a replica as Prometheus families: tokens per expert, and how evenly ranks are loaded.

Series are bounded by the model: one per expert and layer, or where that is more than MAX_SERIES one per
expert over all layers; and three per layer. Imbalance is of the tokens of late, not of all time: what
happened before the last minute or so is forgotten. Pure; owned by the live group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from replicas.expert_loads import EMPTY_SLOT, ExpertLoads
from replicas.parallel.expert_placement import imbalance, no_spares

MAX_SERIES = 4096
ALL_LAYERS = "all"
KEPT_PER_REPORT = 0.95
"""Weight of the past at each report, about one a second: nine tenths are forgotten in 45 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSnapshot:
    """`recent` weighs the tokens of `loads` by their age, layer by layer as there."""

    loads: ExpertLoads
    recent: tuple[float, ...]

    def families(self) -> Iterator[Metric]:
        yield self._tokens()
        if self.loads.num_ranks > 1:
            yield from self._imbalance()

    def _tokens(self) -> Metric:
        loads = self.loads
        family = CounterMetricFamily(
            "wattline_expert_tokens", "Tokens that an expert got.", labels=["layer", "expert"]
        )
        if len(loads.tokens) > MAX_SERIES:
            for expert in range(loads.num_experts):
                family.add_metric([ALL_LAYERS, str(expert)], sum(loads.tokens[expert :: loads.num_experts]))
            return family
        for index, count in enumerate(loads.tokens):
            layer, expert = divmod(index, loads.num_experts)
            family.add_metric([str(layer), str(expert)], count)
        return family

    def _imbalance(self) -> Iterator[Metric]:
        loads = self.loads
        now = GaugeMetricFamily(
            "wattline_expert_imbalance",
            "Busiest rank over the mean, of late: 1 is even.",
            labels=["layer"],
        )
        bare = GaugeMetricFamily(
            "wattline_expert_imbalance_without_copies",
            "What the imbalance would be if no expert had copies in spare slots.",
            labels=["layer"],
        )
        copies = GaugeMetricFamily(
            "wattline_expert_copies", "Experts copied into spare slots.", labels=["layer"]
        )
        for layer in range(loads.num_layers):
            first = layer * loads.num_experts
            recent, spares = self.recent[first : first + loads.num_experts], loads.layer_spares(layer)
            now.add_metric([str(layer)], imbalance(recent, spares))
            bare.add_metric([str(layer)], imbalance(recent, no_spares(loads.num_ranks, 0)))
            copies.add_metric([str(layer)], sum(slot != EMPTY_SLOT for slots in spares for slot in slots))
        yield now
        yield bare
        yield copies


def next_snapshot(before: ExpertSnapshot | None, loads: ExpertLoads) -> ExpertSnapshot:
    """Take in a report."""
    if before is None:
        return ExpertSnapshot(loads=loads, recent=tuple(map(float, loads.tokens)))
    recent = tuple(
        KEPT_PER_REPORT * weighed + new - old
        for weighed, new, old in zip(before.recent, loads.tokens, before.loads.tokens, strict=True)
    )
    return ExpertSnapshot(loads=loads, recent=recent)
