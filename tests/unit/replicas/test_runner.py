"""A runner follows plans: sizes from limits, rows that break alone, and bfloat16 within its bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.errors import BadCheckpoint, RankLost
from replicas.parallel.collectives import Collectives, SoloCollectives
from replicas.plan import NewRow, PlannedRow, StepPlan
from replicas.rank.runner import ModelRunner
from replicas.request import SamplingParams
from tests.checkpoints import make_granite_moe, make_llama, reference_logits
from tests.rank_threads import make_rank_config, run_rank_threads

LIMITS = EngineLimits(max_sequences=4, step_tokens=32, block_tokens=4, num_blocks=16, context_tokens=64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama", seed=10)


def make_config(source: Path, limits: EngineLimits = LIMITS) -> RankConfig:
    return make_rank_config(
        source.parent, rank=0, parallel=ParallelConfig(), source=str(source), limits=limits
    )


def build(config: RankConfig) -> ModelRunner:
    return ModelRunner.build(config, SoloCollectives(), lambda stage, done, total: None)


def start(row: int, token_ids: tuple[int, ...], blocks: tuple[int, ...]) -> PlannedRow:
    return PlannedRow(row=row, start_pos=0, token_ids=token_ids, new_blocks=blocks, samples=True)


def run_new(runner: ModelRunner, *rows: PlannedRow, freed: tuple[int, ...] = ()) -> tuple[int, ...]:
    new_rows = tuple(NewRow(row=row.row, sampling=SamplingParams()) for row in rows)
    plan = StepPlan(step=1, freed_rows=freed, new_rows=new_rows, rows=rows)
    return runner.launch(plan).result().sampled_ids


def decode(runner: ModelRunner, *rows: tuple[int, int, int]) -> tuple[int, ...]:
    """One token each for (row, position, token id) whose blocks have room."""
    planned = tuple(
        PlannedRow(row=row, start_pos=position, token_ids=(token_id,), new_blocks=(), samples=True)
        for row, position, token_id in rows
    )
    return runner.launch(StepPlan(step=1, freed_rows=(), new_rows=(), rows=planned)).result().sampled_ids


def test_it_says_what_it_is(llama: Path) -> None:
    runner = build(make_config(llama))
    assert (runner.num_blocks, runner.context_tokens) == (16, 64)
    assert (runner.dtype, runner.device) == ("float32", "cpu")
    assert runner.spec.eos_token_ids == (2,)
    assert len(runner.weights_digest) == 32


def test_blocks_follow_from_bytes(llama: Path) -> None:
    block_bytes = 2 * 2 * 4 * 4 * 8 * 4
    limits = replace(LIMITS, num_blocks=0, kv_cache_bytes=10 * block_bytes + 5)
    assert build(make_config(llama, limits)).num_blocks == 10
    with pytest.raises(BadCheckpoint, match=f"at least 2 blocks of {block_bytes} bytes"):
        build(make_config(llama, replace(limits, kv_cache_bytes=block_bytes)))


def test_a_context_beyond_the_model_is_refused(llama: Path) -> None:
    assert build(make_config(llama, replace(LIMITS, context_tokens=0))).context_tokens == 512
    with pytest.raises(BadCheckpoint, match="max_position_embeddings=512"):
        build(make_config(llama, replace(LIMITS, context_tokens=513)))


def test_warmup_leaves_nothing_behind(llama: Path) -> None:
    runner = build(make_config(llama))
    before = run_new(runner, start(0, (3, 4, 5), (1,)))
    runner.launch(StepPlan(step=2, freed_rows=(0,), new_rows=(), rows=())).result()
    runner.warmup()
    assert run_new(runner, start(0, (3, 4, 5), (2,))) == before


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_broken_row_fails_alone_and_its_blocks_can_be_used_again(llama: Path, quantization: str) -> None:
    """The next owner of the blocks decodes beside a longer row, whose padding covers what was left there."""
    short, long = (3, 4, 5, 6, 8), tuple(range(10, 19))
    runner = build(replace(make_config(llama), quantization=quantization))
    wanted = run_new(runner, start(0, short, (1, 2)), start(1, long, (3, 4, 5)))
    wanted_next = decode(runner, (0, 5, wanted[0]), (1, 9, wanted[1]))
    with torch.inference_mode():
        runner.decoder._embedding_VH[7] = torch.nan
    broken = start(2, (7,) * 8, (6, 7))
    assert run_new(runner, broken, start(3, long, (8, 9, 10)), freed=(0, 1)) == (-1, wanted[1])
    assert run_new(runner, start(0, short, (7, 6)), freed=(2,)) == wanted[:1]
    assert decode(runner, (0, 5, wanted[0]), (3, 9, wanted[1])) == wanted_next


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_a_broken_prompt_under_way_spoils_nobody_whose_row_had_its_blocks(llama: Path, kernels: str) -> None:
    """Block 5 was the last of row 1, which then holds a shorter sequence and decodes beside a longer one."""
    short, long = (3, 4, 5, 6, 8), tuple(range(10, 19))
    runner = build(replace(make_config(llama), kernels=kernels))
    wanted = run_new(runner, start(0, short, (1, 2)), start(1, long, (3, 4, 5)))
    wanted_next = decode(runner, (0, 5, wanted[0]), (1, 9, wanted[1]))
    run_new(runner, start(1, short, (1, 2)), start(0, long, (8, 9, 10)), freed=(0, 1))
    with torch.inference_mode():
        runner.decoder._embedding_VH[7] = torch.nan
    run_new(runner, replace(start(2, (7,) * 4, (5,)), samples=False))
    assert decode(runner, (1, 5, wanted[0]), (0, 9, wanted[1])) == wanted_next


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_the_blocks_of_a_broken_prompt_that_never_sampled_can_be_used_again(
    llama: Path, kernels: str
) -> None:
    """As after a cancel: the next owner decodes beside a longer row, whose padding covers what was left."""
    short, long = (3, 4, 5, 6, 8), tuple(range(10, 19))
    runner = build(replace(make_config(llama), kernels=kernels))
    wanted = run_new(runner, start(0, short, (1, 2)), start(1, long, (3, 4, 5)))
    wanted_next = decode(runner, (0, 5, wanted[0]), (1, 9, wanted[1]))
    with torch.inference_mode():
        runner.decoder._embedding_VH[7] = torch.nan
    broken = replace(start(2, (7,) * 8, (6, 7)), samples=False)
    assert run_new(runner, broken, start(3, long, (8, 9, 10)), freed=(0, 1)) == wanted[1:]
    assert run_new(runner, start(0, short, (7, 6)), freed=(2,)) == wanted[:1]
    assert decode(runner, (0, 5, wanted[0]), (3, 9, wanted[1])) == wanted_next


def test_who_shares_a_broken_block_fails_though_its_first_owner_is_gone(llama: Path) -> None:
    runner = build(replace(make_config(llama), kernels="off"))
    with torch.inference_mode():
        runner.decoder._embedding_VH[7] = torch.nan
    run_new(runner, replace(start(2, (7,) * 8, (6, 7)), samples=False))
    run_new(runner, replace(start(0, (3,), (6, 8)), start_pos=4, samples=False))
    runner.launch(StepPlan(step=1, freed_rows=(2,), new_rows=(), rows=())).result()
    assert decode(runner, (0, 5, 4)) == (-1,)


def test_a_chunk_that_does_not_sample_gives_no_id(llama: Path) -> None:
    runner = build(make_config(llama))
    whole = run_new(runner, start(0, (3, 4, 5, 6, 8), (1, 2)))
    assert run_new(runner, replace(start(1, (3, 4), (3,)), samples=False)) == ()
    rest = PlannedRow(row=1, start_pos=2, token_ids=(5, 6, 8), new_blocks=(4,), samples=True)
    assert (
        runner.launch(StepPlan(step=3, freed_rows=(), new_rows=(), rows=(rest,))).result().sampled_ids
        == whole
    )


def test_experts_hit_are_counted_over_layers(tmp_path: Path) -> None:
    runner = build(make_config(make_granite_moe(tmp_path / "moe", vocab_size=515)))
    plan = StepPlan(
        step=1,
        freed_rows=(),
        new_rows=(NewRow(row=0, sampling=SamplingParams()),),
        rows=(start(0, (3,), (1,)),),
    )
    assert runner.launch(plan).result().experts_hit == 2 * 2


def test_bfloat16_is_as_close_to_float64_as_transformers_is(llama: Path) -> None:
    limits = replace(LIMITS, max_sequences=24, num_blocks=128)
    runner = build(replace(make_config(llama, limits), dtype="bfloat16"))
    assert runner.dtype == "bfloat16"
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 500, (24, 20), generator=generator).tolist()
    plan = StepPlan(
        step=1,
        freed_rows=(),
        new_rows=tuple(NewRow(row=row, sampling=SamplingParams()) for row in range(24)),
        rows=tuple(
            start(row, tuple(prompt), tuple(range(1 + 5 * row, 6 + 5 * row)))
            for row, prompt in enumerate(prompts)
        ),
    )
    with torch.inference_mode():
        runner._rows.apply(plan)
        logits, _ = runner.decoder.logits(runner._rows.batch(plan))
    exact, theirs = (
        torch.stack([rows[-1] for rows in reference_logits(llama, prompts, dtype)])
        for dtype in (torch.float64, torch.bfloat16)
    )
    our_error, their_error = (float((got - exact).norm()) for got in (logits[:, :515], theirs))
    assert our_error < 1.1 * their_error
    assert our_error < 0.05 * float(exact.norm())


def test_ranks_that_read_different_weights_refuse_each_other(tmp_path: Path, llama: Path) -> None:
    other = make_llama(tmp_path / "other", seed=11)
    parallel = ParallelConfig(tensor=2)
    configs = [
        make_rank_config(tmp_path, rank=rank, parallel=parallel, source=str(source), limits=LIMITS)
        for rank, source in enumerate((llama, other))
    ]

    def work(config: RankConfig, collectives: Collectives) -> object:
        return ModelRunner.build(config, collectives, lambda stage, done, total: None)

    for result in run_rank_threads(configs, work):
        assert isinstance(result, RankLost)
