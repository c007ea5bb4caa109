"""Copies of hot experts in the spare slots of ranks that have less to do, revised as the load shifts.

Every rank looks at the same counts before the same step and comes to the same decision, so nothing but the
weights crosses between ranks. One layer is looked at per step, and each once in `rebalance_steps`: a step
moves at most the spare slots of one layer. Called by the runner at each plan; not while a step runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from replicas.config import ParallelConfig
from replicas.expert_loads import EMPTY_SLOT
from replicas.layers.expert_routes import ExpertRoutes
from replicas.parallel.collectives import Collectives
from replicas.parallel.expert_placement import (
    Spares,
    holders,
    imbalance,
    keep_slots,
    no_spares,
    place_copies,
)

MIN_GAIN = 0.05
"""Share of the imbalance that a move must take away: less is noise, and moving costs."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class ExpertStore(Protocol):
    """Where a rank keeps the weights of its slots."""

    def expert_tensors(self, layer: int, slot: int) -> tuple[torch.Tensor, ...]:
        """All there is to one expert, contiguous."""

    def put_expert(self, layer: int, slot: int, tensors: Sequence[torch.Tensor]) -> None:
        """Fill a spare slot with what `expert_tensors` gave elsewhere, flattened."""


class ExpertCopies:
    """Owns the spare slots of all ranks, as each rank knows them, and the routes that follow from them."""

    def __init__(
        self,
        parallel: ParallelConfig,
        tally_LX: torch.Tensor,
        collectives: Collectives,
        routes: Sequence[ExpertRoutes],
    ) -> None:
        self._parallel = parallel
        self._tally_LX = tally_LX
        self._seen_LX = torch.zeros_like(tally_LX)
        self._collectives = collectives
        self._routes = routes
        self._num_experts = tally_LX.shape[1]
        self._num_home = self._num_experts // parallel.expert
        self._period = max(parallel.rebalance_steps, len(tally_LX))
        self.spares: list[Spares] = [no_spares(parallel.expert, parallel.spare_experts) for _ in routes]
        for layer in range(len(routes)):
            self._set_routes(layer)

    @property
    def flat_spares(self) -> tuple[int, ...]:
        """As `ExpertLoads.spares` has them."""
        return tuple(expert for spares in self.spares for slots in spares for expert in slots)

    def look(self, step: int, store: ExpertStore) -> None:
        """Revise the copies of the layer whose turn it is. All ranks call it before the same step."""
        layer = step % self._period
        if step < self._period or layer >= len(self._routes):
            return
        tokens = (self._tally_LX[layer] - self._seen_LX[layer]).tolist()
        self._seen_LX[layer].copy_(self._tally_LX[layer])
        parallel, old = self._parallel, self.spares[layer]
        placed = place_copies(tokens, num_ranks=parallel.expert, num_spare=parallel.spare_experts)
        if imbalance(tokens, placed) <= (1 - MIN_GAIN) * imbalance(tokens, old):
            self._move(layer, old, keep_slots(old, placed), store)

    def _move(self, layer: int, old: Spares, new: Spares, store: ExpertStore) -> None:
        """Each expert that some rank has no copy of yet is sent once, from its home."""
        before, after = (holders(spares, num_experts=self._num_experts) for spares in (old, new))
        own = new[self._collectives.rank]
        for expert in range(self._num_experts):
            coming = set(after[expert]) - set(before[expert])
            if not coming:
                continue
            home, slot = divmod(expert, self._num_home)
            is_home = home == self._collectives.rank
            sent = store.expert_tensors(layer, slot) if is_home else ()
            tensors = broadcast_tensors(self._collectives, sent, source=home, device=self._tally_LX.device)
            if self._collectives.rank in coming:
                store.put_expert(layer, self._num_home + own.index(expert), tensors)
        self.spares[layer] = new
        self._set_routes(layer)

    def _set_routes(self, layer: int) -> None:
        rank, spares = self._collectives.rank, self.spares[layer]
        own_slots = {rank * self._num_home + slot: slot for slot in range(self._num_home)}
        for slot, expert in enumerate(spares[rank]):
            if expert != EMPTY_SLOT:
                own_slots[expert] = self._num_home + slot
        self._routes[layer].set(holders(spares, num_experts=self._num_experts), own_slots, rank=rank)


def broadcast_tensors(
    collectives: Collectives, tensors: Sequence[torch.Tensor], *, source: int, device: torch.device
) -> list[torch.Tensor]:
    """The tensors of rank `source` on every rank, flat; the others give none and need not know what comes."""
    is_source = collectives.rank == source

    def spread(own: torch.Tensor, count: int) -> torch.Tensor:
        counts = [count if rank == source else 0 for rank in range(collectives.size)]
        return collectives.all_gather_rows(own if is_source else own[:0], counts)

    header = [word for tensor in tensors for word in (_DTYPES.index(tensor.dtype), tensor.numel())]
    (num_words,) = spread(torch.tensor([len(header)], device=device), 1).tolist()
    words = spread(torch.tensor(header, dtype=torch.int64, device=device), num_words).tolist()
    received = []
    for index, (code, numel) in enumerate(zip(words[::2], words[1::2], strict=True)):
        dtype = _DTYPES[code]
        own = tensors[index].reshape(-1) if is_source else torch.empty(0, dtype=dtype, device=device)
        received.append(spread(own, numel))
    return received
