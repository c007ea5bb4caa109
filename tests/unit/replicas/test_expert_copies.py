"""Weights of any dtype reach all ranks; copies are revised in turn, and only where that gains something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from replicas.config import ParallelConfig, RankConfig
from replicas.layers.expert_routes import ExpertRoutes
from replicas.parallel.collectives import Collectives
from replicas.parallel.expert_placement import Spares
from replicas.rank.expert_copies import ExpertCopies, broadcast_tensors
from tests.rank_threads import make_rank_config, run_rank_threads

PARALLEL = ParallelConfig(expert=2, layout="dispatch", spare_experts=1, rebalance_steps=4)
CPU = torch.device("cpu")


class NumberStore:
    """An expert's only weight is its number."""

    def __init__(self, rank: int) -> None:
        self.slots = {slot: 2.0 * rank + slot for slot in range(2)}

    def expert_tensors(self, layer: int, slot: int) -> tuple[torch.Tensor, ...]:
        return (torch.tensor([self.slots[slot]]),)

    def put_expert(self, layer: int, slot: int, tensors: Sequence[torch.Tensor]) -> None:
        (self.slots[slot],) = tensors[0].tolist()


def make_configs(folder: Path) -> list[RankConfig]:
    return [make_rank_config(folder, rank=rank, parallel=PARALLEL) for rank in range(2)]


def test_tensors_arrive_flat_and_whole(tmp_path: Path) -> None:
    sent = (
        torch.arange(6.0).view(2, 3),
        torch.arange(4).to(torch.bfloat16),
        torch.arange(-3, 400_000).to(torch.int8),
    )

    def work(config: RankConfig, collectives: Collectives) -> list[torch.Tensor]:
        mine = sent if config.rank == 1 else ()
        return broadcast_tensors(collectives, mine, source=1, device=CPU)

    for result in run_rank_threads(make_configs(tmp_path), work):
        assert isinstance(result, list), result
        for got, wanted in zip(result, sent, strict=True):
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted.flatten())


def test_copies_follow_the_load_of_the_last_period(tmp_path: Path) -> None:
    tokens_at = {5: (80, 4, 8, 8), 9: (41, 40, 40, 39), 13: (0, 0, 0, 100)}

    def work(config: RankConfig, collectives: Collectives) -> list[tuple[Spares, dict[int, float]]]:
        tally_LX = torch.zeros((2, 4), dtype=torch.int64)
        routes = [ExpertRoutes.empty(num_experts=4, num_ranks=2, num_slots=3, device=CPU) for _ in range(2)]
        copies, store = ExpertCopies(PARALLEL, tally_LX, collectives, routes), NumberStore(config.rank)
        seen = []
        for step in range(1, 14):
            tally_LX[1] += torch.tensor(tokens_at.get(step, (0, 0, 0, 0)))
            copies.look(step, store)
            if step in tokens_at:
                seen.append((copies.spares[1], dict(store.slots)))
        assert copies.spares[0] == ((-1,), (-1,)), "nothing ran in the first layer"
        return seen

    results = run_rank_threads(make_configs(tmp_path), work)
    for rank, result in enumerate(results):
        assert isinstance(result, list), result
        even = hot = ((2,), (0,))
        assert [spares for spares, _ in result] == [hot, even, ((3,), (-1,))]
        spare_weights = [slots[2] for _, slots in result]
        assert spare_weights[0] == (2.0, 0.0)[rank]
        assert spare_weights[2] == (3.0, 0.0)[rank]
