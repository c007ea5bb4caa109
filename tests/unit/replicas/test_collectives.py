"""Ranks sum and gather the same bits, meet, and notice the loss of a peer. Threads stand in for processes
here; `tests/integration/test_rank_processes.py` has the real ones."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replicas.config import ParallelConfig, RankConfig
from replicas.errors import RankLost
from replicas.parallel.collectives import Collectives, SoloCollectives, make_collectives
from replicas.parallel.shared_memory import SLAB_BYTES
from tests.rank_threads import make_rank_config, run_rank_threads


def make_configs(folder: Path, size: int, *, timeout_s: float = 150.0) -> list[RankConfig]:
    parallel = ParallelConfig(tensor=size)
    return [
        make_rank_config(folder, rank=rank, parallel=parallel, timeout_s=timeout_s) for rank in range(size)
    ]


def rank_tensor(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_rank_gets_the_same_sum(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    shapes = [(1,), (3, 5), (64, 33), (7,)]

    def work(config: RankConfig, collectives: Collectives) -> list[torch.Tensor]:
        return [collectives.all_reduce(rank_tensor(config.rank, shape, dtype)) for shape in shapes]

    results = run_rank_threads(make_configs(tmp_path, size), work)
    for index, shape in enumerate(shapes):
        total = torch.stack([rank_tensor(rank, shape, dtype).float() for rank in range(size)]).sum(0)
        first = results[0]
        assert isinstance(first, list)
        torch.testing.assert_close(first[index].float(), total.to(dtype).float(), rtol=1e-6, atol=1e-6)
        for other in results[1:]:
            assert isinstance(other, list)
            assert torch.equal(other[index], first[index])


def test_tensors_larger_than_a_slab_go_through_in_pieces(tmp_path: Path) -> None:
    count = SLAB_BYTES // 4 * 2 + 17

    def work(config: RankConfig, collectives: Collectives) -> tuple[torch.Tensor, torch.Tensor]:
        ramp = torch.arange(count, dtype=torch.float32) * (config.rank + 1)
        gathered = collectives.all_gather(ramp)
        return collectives.all_reduce(ramp), gathered

    for result in run_rank_threads(make_configs(tmp_path, 2), work):
        assert isinstance(result, tuple)
        assert torch.equal(result[0], torch.arange(count, dtype=torch.float32) * 3)
        assert torch.equal(result[1][1], torch.arange(count, dtype=torch.float32) * 2)


def test_gather_keeps_shape_dtype_and_rank_order(tmp_path: Path) -> None:
    def work(config: RankConfig, collectives: Collectives) -> torch.Tensor:
        return collectives.all_gather(torch.full((2, 3), config.rank, dtype=torch.int64))

    for result in run_rank_threads(make_configs(tmp_path, 4), work):
        assert isinstance(result, torch.Tensor)
        assert result.dtype == torch.int64
        assert result[:, 1, 2].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(2, 2, 2), (0, 5, 1), (3, 0, 0), (9000, 4, 1)])
def test_rows_of_unequal_ranks_are_gathered_and_summed_back(
    tmp_path: Path, counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The largest takes two slabs."""
    total = sum(counts)

    def work(config: RankConfig, collectives: Collectives) -> tuple[torch.Tensor, torch.Tensor]:
        gathered = collectives.all_gather_rows(
            rank_tensor(config.rank, (counts[config.rank], 40), dtype), counts
        )
        summed = collectives.reduce_scatter_rows(rank_tensor(7 + config.rank, (total, 40), dtype), counts)
        return gathered, summed

    results = run_rank_threads(make_configs(tmp_path, 3), work)
    everyone = torch.cat([rank_tensor(rank, (count, 40), dtype) for rank, count in enumerate(counts)])
    partial = [rank_tensor(7 + rank, (total, 40), dtype).float() for rank in range(3)]
    sums = (partial[0] + partial[1] + partial[2]).to(dtype).split_with_sizes(list(counts))
    for rank, result in enumerate(results):
        assert isinstance(result, tuple), result
        assert torch.equal(result[0], everyone)
        assert torch.equal(result[1], sums[rank])


def test_the_file_is_gone_once_all_ranks_are_attached(tmp_path: Path) -> None:
    def work(config: RankConfig, collectives: Collectives) -> list[Path]:
        collectives.barrier()
        return list(tmp_path.iterdir())

    assert run_rank_threads(make_configs(tmp_path, 2), work) == [[], []]


def test_a_file_left_by_a_dead_group_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "group.7.collectives").write_bytes(b"\0" * 100)

    def work(config: RankConfig, collectives: Collectives) -> float:
        return float(collectives.all_reduce(torch.ones(1)))

    assert run_rank_threads(make_configs(tmp_path, 2), work) == [2.0, 2.0]


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match=r"ranks \[1\] did not attach"):
        make_collectives(make_configs(tmp_path, 2, timeout_s=0.02)[0])
    with pytest.raises(RankLost, match="rank 0 did not open"):
        make_collectives(make_configs(tmp_path, 2, timeout_s=0.02)[1])
    assert list(tmp_path.iterdir()) == []


def test_an_abort_ends_the_wait_of_a_peer(tmp_path: Path) -> None:
    def work(config: RankConfig, collectives: Collectives) -> None:
        if config.rank == 1:
            collectives.abort()
        else:
            collectives.barrier(timeout_s=60.0)

    results = run_rank_threads(make_configs(tmp_path, 2), work)
    assert isinstance(results[0], RankLost)
    assert "aborted" in str(results[0])


def test_a_peer_that_is_too_late_is_named(tmp_path: Path) -> None:
    def work(config: RankConfig, collectives: Collectives) -> None:
        if config.rank == 0:
            collectives.barrier(timeout_s=0.01)

    results = run_rank_threads(make_configs(tmp_path, 2), work)
    assert isinstance(results[0], RankLost)
    assert str(results[0]) == "rank 1 kept rank 0 waiting for 0.01 s"


def test_who_still_loads_may_keep_others_waiting_until_the_group_is_warm(tmp_path: Path) -> None:
    configs = [replace(config, collective_timeout_s=0.01) for config in make_configs(tmp_path, 2)]

    def work(config: RankConfig, collectives: Collectives) -> float:
        if config.rank == 1:
            time.sleep(0.1)  # Longer than a warm group waits.
        collectives.barrier()
        return collectives.all_reduce(torch.ones(1)).item()

    assert run_rank_threads(configs, work) == [2.0, 2.0]


def test_a_group_of_one_needs_nobody(tmp_path: Path) -> None:
    collectives = make_collectives(make_configs(tmp_path, 1)[0])
    assert isinstance(collectives, SoloCollectives)
    assert collectives.all_gather(torch.ones(2)).shape == (1, 2)
