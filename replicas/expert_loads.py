"""How many tokens went to each expert, and which experts have copies where: what rank 0 reports of a MoE.

Plain data; `parallel/expert_placement.py` has the arithmetic. Every rank counts the same, because every rank
routes all tokens, so rank 0 speaks for the group.
"""

from __future__ import annotations

from dataclasses import dataclass

EMPTY_SLOT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoads:
    """Sums since the engine was ready, layer by layer: `tokens[layer * num_experts + expert]`.

    A token counts once for each of its choices. `spares` are the experts in the spare slots of every rank,
    `spares[(layer * num_ranks + rank) * num_spare + slot]`, or EMPTY_SLOT.
    """

    num_experts: int
    tokens: tuple[int, ...]
    num_ranks: int = 1
    spares: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.tokens) // self.num_experts

    def layer_tokens(self, layer: int) -> tuple[int, ...]:
        return self.tokens[layer * self.num_experts : (layer + 1) * self.num_experts]

    def layer_spares(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Per rank, its spare slots in one layer."""
        per_rank = len(self.spares) // (self.num_layers * self.num_ranks)
        first = layer * self.num_ranks * per_rank
        return tuple(
            self.spares[first + rank * per_rank : first + (rank + 1) * per_rank]
            for rank in range(self.num_ranks)
        )
