"""Sampling follows the distribution, and depends on seed and position alone: not on batch, rank or split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from replicas.config import ParallelConfig, RankConfig
from replicas.parallel.collectives import Collectives, SoloCollectives
from replicas.rank.batch import Draw
from replicas.rank.sampler import NOT_FINITE, best_tokens, gumbel_noise, pick_tokens, row_keys, sample
from replicas.request import SamplingParams
from tests.rank_threads import make_rank_config, run_rank_threads
from tests.shards import make_shard, shard_of_logits


def sample_solo(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    shard = make_shard(logits.shape[1])
    return sample(shard_of_logits(logits, shard), draws, shard, SoloCollectives()).tolist()


def make_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return 3.0 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def make_draws(params: SamplingParams, positions: range) -> list[Draw]:
    return [Draw(row=0, sampling=params, position=position) for position in positions]


def noise_of(draws: list[Draw], first_id: int, count: int) -> torch.Tensor:
    return gumbel_noise(torch.from_numpy(row_keys(draws)), first_id, count)


GREEDY = SamplingParams()


def test_greedy_takes_the_best_and_the_lowest_of_equals() -> None:
    logits = torch.zeros(3, 70)
    logits[0, 65] = logits[0, 3] = 2.0
    logits[1, 69] = 1.0
    assert sample_solo(logits, make_draws(GREEDY, range(3))) == [3, 69, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, top_p=0.5)])
def test_a_row_that_is_not_finite_fails_alone(bad: float, params: SamplingParams) -> None:
    logits = make_logits(3, 70)
    wanted = sample_solo(logits, make_draws(params, range(3)))
    logits[1, 68] = bad
    assert sample_solo(logits, make_draws(params, range(3))) == [wanted[0], NOT_FINITE, wanted[2]]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_agree_with_one_rank(tmp_path: Path, num_ranks: int) -> None:
    logits = make_logits(6, 515)
    logits[4, 500] = torch.nan
    params = [
        GREEDY,
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=1.3, top_k=5, seed=2),
        SamplingParams(temperature=0.7, top_p=0.9, seed=2**63),
        GREEDY,
        SamplingParams(temperature=1e-9, top_p=0.1, top_k=3, seed=4, min_p=0.5),
    ]
    draws = [Draw(row=row, sampling=each, position=100 + row) for row, each in enumerate(params)]
    wanted = sample_solo(logits, draws)
    assert wanted[4] == NOT_FINITE
    assert wanted[5] == int(logits[5].argmax())
    parallel = ParallelConfig(tensor=num_ranks)
    configs = [make_rank_config(tmp_path, rank=rank, parallel=parallel) for rank in range(num_ranks)]

    def work(config: RankConfig, collectives: Collectives) -> list[int]:
        shard = make_shard(515, rank=config.rank, num_ranks=num_ranks)
        return sample(shard_of_logits(logits, shard), draws, shard, collectives).tolist()

    assert run_rank_threads(configs, work) == [wanted] * num_ranks


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    logits = make_logits(8, 200)
    params = [
        SamplingParams(temperature=0.5 + index / 4, top_k=index * 7 % 20, top_p=1.0 - index / 16, seed=index)
        for index in range(8)
    ]
    draws = [Draw(row=row, sampling=each, position=9) for row, each in enumerate(params)]
    together = sample_solo(logits, draws)
    alone = [sample_solo(logits[row : row + 1], [draws[row]])[0] for row in range(8)]
    assert together == alone


def test_picking_with_fixed_shapes_gives_the_same_tokens() -> None:
    logits = make_logits(6, 200)
    logits[3, 7] = torch.nan
    params = [SamplingParams(temperature=0.3 * (index % 3), seed=index) for index in range(6)]
    draws = [Draw(row=row, sampling=each, position=40 + row) for row, each in enumerate(params)]
    shard = make_shard(200)
    picked = pick_tokens(
        shard_of_logits(logits, shard),
        torch.from_numpy(row_keys(draws)),
        torch.tensor([each.temperature for each in params]),
        shard,
        SoloCollectives(),
        best_tokens,
    )
    assert picked.tolist() == sample_solo(logits, draws)
    assert picked[3] == NOT_FINITE


def test_position_and_seed_change_the_draw_and_nothing_else_does() -> None:
    logits = make_logits(1, 200).expand(50, -1)
    base = SamplingParams(temperature=1.0, seed=5)
    first = sample_solo(logits, make_draws(base, range(50)))
    assert first == sample_solo(logits, make_draws(base, range(50)))
    assert first != sample_solo(logits, make_draws(SamplingParams(temperature=1.0, seed=6), range(50)))
    assert len(set(first)) > 5


def test_the_noise_never_changes() -> None:
    """Recorded values: a change here breaks the continuity of sequences between versions."""
    draws = [Draw(row=0, sampling=SamplingParams(seed=12345), position=678)]
    noise = noise_of(draws, 10, 4)
    assert torch.equal(noise, noise_of(draws, 0, 64)[:, 10:14])
    torch.testing.assert_close(
        noise, torch.tensor([[-0.131318, 0.766969, 0.474014, -0.322366]]), rtol=1e-5, atol=1e-5
    )


def test_the_noise_is_gumbel() -> None:
    draws = make_draws(SamplingParams(seed=3), range(50))
    noise = noise_of(draws, 0, 4000)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.03)
    correlation = torch.corrcoef(noise[:10])
    assert float((correlation - torch.eye(10)).abs().max()) < 0.06


def test_a_token_that_stands_alone_is_drawn_whatever_its_noise() -> None:
    """Its hash is one of the 32 of 2**31 that round up: had it noise of minus infinity, 0 were drawn."""
    params = SamplingParams(temperature=1.0, top_k=1, seed=42)
    logits = torch.zeros(1, 58150)
    logits[0, 58149] = 9.0
    assert noise_of(make_draws(params, range(1)), 58149, 1).isfinite().all()
    assert sample_solo(logits, make_draws(params, range(1))) == [58149]


@pytest.mark.parametrize(
    ("params", "probabilities"),
    [
        (SamplingParams(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (SamplingParams(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),
        (SamplingParams(temperature=1.0, top_k=2), [0.625, 0.375, 0.0, 0.0]),
        (SamplingParams(temperature=1.0, top_p=0.7), [0.625, 0.375, 0.0, 0.0]),
        (SamplingParams(temperature=1.0, top_p=0.81), [0.5263, 0.3158, 0.1579, 0.0]),
        (SamplingParams(temperature=1.0, top_k=3, top_p=0.82), [0.625, 0.375, 0.0, 0.0]),
        (SamplingParams(temperature=1.0, top_p=0.0), [1.0, 0.0, 0.0, 0.0]),
        (SamplingParams(temperature=1.0, top_k=1), [1.0, 0.0, 0.0, 0.0]),
        (SamplingParams(temperature=1.0, min_p=0.25), [0.5263, 0.3158, 0.1579, 0.0]),
        (SamplingParams(temperature=0.5, min_p=0.25), [0.7353, 0.2647, 0.0, 0.0]),
        (SamplingParams(temperature=1.0, min_p=0.25, top_k=2), [0.625, 0.375, 0.0, 0.0]),
        (SamplingParams(temperature=1.0, min_p=0.7, top_p=0.81), [1.0, 0.0, 0.0, 0.0]),
        (SamplingParams(temperature=1.0, min_p=1.0), [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_frequencies_follow_the_distribution(params: SamplingParams, probabilities: list[float]) -> None:
    num_draws = 8_000
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(num_draws, -1)
    ids = sample_solo(logits, make_draws(params, range(num_draws)))
    for token_id, probability in enumerate(probabilities):
        frequency = ids.count(token_id) / num_draws
        assert frequency == pytest.approx(probability, abs=0.02)
        assert (frequency == 0.0) == (probability == 0.0)


def test_top_p_beyond_the_first_candidates_sorts_the_whole_vocabulary() -> None:
    logits = torch.zeros(64, 5000)
    logits[:, 4000:] = -2.0
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=1)
    ids = sample_solo(logits, make_draws(params, range(64)))
    assert max(ids) < 4000
    assert len(set(ids)) > 50
