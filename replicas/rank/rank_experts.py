"""What one rank knows of the experts of all: tokens of each so far, and copies of the hot ones.

Every rank routes all tokens and therefore counts the same. Owned by the runner; the layers count into
`tally_LX` and read `routes`. Shape letters: L layers, X all experts; X is 0 for a dense model.
"""

from __future__ import annotations

import torch

from replicas.config import ParallelConfig
from replicas.expert_loads import ExpertLoads
from replicas.layers.expert_routes import ExpertRoutes
from replicas.models.spec import ModelSpec
from replicas.parallel.collectives import Collectives
from replicas.parallel.degrees import Shard
from replicas.rank.expert_copies import ExpertCopies, ExpertStore


class RankExperts:
    """`routes`: one per layer, none where no expert has room for a copy."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        parallel: ParallelConfig,
        collectives: Collectives,
        device: torch.device,
    ) -> None:
        self._num_ranks = parallel.expert
        self.tally_LX = torch.zeros((spec.num_layers, spec.num_experts), dtype=torch.int64, device=device)
        self.routes: tuple[ExpertRoutes, ...] = ()
        self._copies: ExpertCopies | None = None
        if shard.num_spare_experts:
            num_slots = shard.num_experts + shard.num_spare_experts
            self.routes = tuple(
                ExpertRoutes.empty(
                    num_experts=spec.num_experts,
                    num_ranks=parallel.expert,
                    num_slots=num_slots,
                    device=device,
                )
                for _ in range(spec.num_layers)
            )
            self._copies = ExpertCopies(parallel, self.tally_LX, collectives, self.routes)

    def before_step(self, step: int, store: ExpertStore) -> None:
        """Revise copies, where it is time. All ranks call it before the same step."""
        if self._copies is not None:
            self._copies.look(step, store)

    def forget(self) -> None:
        """Count from here on: a warm-up says nothing of the load to come."""
        self.tally_LX.zero_()

    def loads(self) -> ExpertLoads:
        """Waits for the device. For models with experts."""
        return ExpertLoads(
            num_experts=self.tally_LX.shape[1],
            tokens=tuple(self.tally_LX.view(-1).tolist()),
            num_ranks=self._num_ranks,
            spares=() if self._copies is None else self._copies.flat_spares,
        )
