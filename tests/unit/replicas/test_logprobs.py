"""Logprobs against log_softmax of the whole row, on one rank and on several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from replicas.config import ParallelConfig, RankConfig
from replicas.parallel.collectives import Collectives, SoloCollectives
from replicas.rank.batch import Draw
from replicas.rank.logprobs import Asked, measure_logprobs, read_logprobs, stage_logprobs
from replicas.rank.transfer import Upload
from replicas.request import SamplingParams, TokenLogprobs
from tests.rank_threads import make_rank_config, run_rank_threads
from tests.shards import make_shard, shard_of_logits

VOCAB_SIZE = 70
ASKED = (3, None, 0, 20)
IDS = (5, 6, 69, -1)


def make_logits() -> torch.Tensor:
    logits = 3.0 * torch.randn(len(ASKED), VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    logits[3, 4] = torch.nan
    return logits


def make_draws(asked: tuple[int | None, ...]) -> list[Draw]:
    # Temperature, penalties and biases do not show in logprobs.
    return [
        Draw(
            row=row,
            sampling=SamplingParams(temperature=0.5, logit_bias=((3, 9.0),), num_logprobs=count),
            position=9,
        )
        for row, count in enumerate(asked)
    ]


def stage(draws: list[Draw]) -> Asked | None:
    upload = Upload()
    asked = stage_logprobs(draws, upload)
    upload.send()
    return asked


def check(said: tuple[TokenLogprobs | None, ...]) -> None:
    first, second, third, _ = said
    assert first is not None and second is None and third is not None
    wanted = make_logits().log_softmax(dim=1)
    assert first.logprob == pytest.approx(float(wanted[0, 5]), abs=1e-5)
    assert third.logprob == pytest.approx(float(wanted[2, 69]), abs=1e-5)
    best = wanted[0].topk(3)
    assert [token_id for token_id, _ in first.top] == best.indices.tolist()
    assert [logprob for _, logprob in first.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert third.top == ()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_logprobs_are_those_of_the_whole_vocabulary(tmp_path: Path, num_ranks: int) -> None:
    parallel = ParallelConfig(tensor=num_ranks)
    configs = [make_rank_config(tmp_path, rank=rank, parallel=parallel) for rank in range(num_ranks)]

    def work(config: RankConfig, collectives: Collectives) -> object:
        shard = make_shard(VOCAB_SIZE, rank=config.rank, num_ranks=num_ranks)
        logits = shard_of_logits(make_logits(), shard)
        measured = measure_logprobs(logits, torch.tensor(IDS), stage(make_draws(ASKED)), collectives)
        assert measured is not None and measured.shape == (3, 41)
        said = read_logprobs(measured.tolist(), make_draws(ASKED))
        check(said)
        return said[:3]

    results = run_rank_threads(configs, work)
    assert not [result for result in results if isinstance(result, BaseException)], results
    assert all(result == results[0] for result in results)


def test_rows_that_do_not_ask_cost_nothing() -> None:
    logits = shard_of_logits(make_logits()[:2], make_shard(VOCAB_SIZE))
    draws = make_draws((None, None))
    assert measure_logprobs(logits, torch.tensor([1, 2]), stage(draws), SoloCollectives()) is None
