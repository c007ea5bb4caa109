"""Every batch finds the smallest graph that holds it; padding adds rows that touch nothing of anybody's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.config import EngineLimits
from replicas.plan import NewRow, PlannedRow, StepPlan
from replicas.rank.batch import Rows
from replicas.rank.buckets import (
    KEY,
    ROW,
    SLOT,
    TEMPERATURE,
    bucket_of,
    bucket_sizes,
    chunk_sizes,
    decode_words,
)
from replicas.rank.device_steps import DeviceSupport
from replicas.rank.graphs import EagerBackend
from replicas.rank.runner import ModelRunner
from replicas.rank.sampler import row_key
from replicas.rank.transfer import HostTransfer
from replicas.request import SamplingParams
from tests.checkpoints import make_llama
from tests.engine_answers import make_runner

LIMITS = EngineLimits(max_sequences=11, step_tokens=64, block_tokens=4, num_blocks=64, context_tokens=40)
PADDING_ROW = 11


def test_the_usual_sizes() -> None:
    assert bucket_sizes(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert bucket_sizes(3) == (1, 2, 3)


def test_prompt_chunks_of_every_power_of_two_are_warmed_up() -> None:
    assert chunk_sizes(20) == (2, 4, 8, 16, 20)
    assert chunk_sizes(16) == (2, 4, 8, 16)
    assert chunk_sizes(1) == (1,)


@settings(derandomize=True)
@given(st.integers(1, 600), st.data())
def test_a_batch_gets_the_smallest_size_that_holds_it(most: int, data: st.DataObject) -> None:
    sizes = bucket_sizes(most)
    num_rows = data.draw(st.integers(1, most))
    size = bucket_of(num_rows, sizes)
    assert sizes == tuple(sorted(set(sizes))) and sizes[-1] == most
    assert size == min(each for each in sizes if each >= num_rows)
    assert size - num_rows <= 7


def make_plan(lengths: list[int], samplings: list[SamplingParams]) -> tuple[StepPlan, StepPlan]:
    """Rows with `lengths` tokens cached, in blocks of their own, and a step in which each decodes one."""
    prompts, decodes, next_block = [], [], 1
    for row, length in enumerate(lengths):
        num_blocks = -(-(length + 1) // LIMITS.block_tokens)
        blocks = tuple(range(next_block, next_block + num_blocks))
        next_block += num_blocks
        ids = tuple(3 + (7 * row + pos) % 500 for pos in range(length))
        prompts.append(PlannedRow(row=row, start_pos=0, token_ids=ids, new_blocks=blocks, samples=True))
        decodes.append(
            PlannedRow(row=row, start_pos=length, token_ids=(5 + row,), new_blocks=(), samples=True)
        )
    new_rows = tuple(NewRow(row=row, sampling=sampling) for row, sampling in enumerate(samplings))
    return (
        StepPlan(step=1, freed_rows=(), new_rows=new_rows, rows=tuple(prompts)),
        StepPlan(step=2, freed_rows=(), new_rows=(), rows=tuple(decodes)),
    )


lengths_of_rows = st.lists(st.integers(1, 15), min_size=1, max_size=11)
samplings_of_rows = st.lists(
    st.builds(SamplingParams, temperature=st.sampled_from((0.0, 0.5)), seed=st.integers(0, 2**64 - 1)),
    min_size=11,
    max_size=11,
)


@settings(derandomize=True, max_examples=50)
@given(lengths_of_rows, samplings_of_rows, st.integers(0, 9))
def test_padding_rows_write_to_scratch_and_belong_to_nobody(
    lengths: list[int], samplings: list[SamplingParams], num_padding: int
) -> None:
    rows = Rows(
        max_sequences=11,
        max_blocks=10,
        block_tokens=LIMITS.block_tokens,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    prompts, decodes = make_plan(lengths, samplings[: len(lengths)])
    rows.apply(prompts)
    rows.apply(decodes)
    flat = rows.flatten(decodes)
    words = decode_words(flat, size=len(lengths) + num_padding, padding_row=PADDING_ROW)
    real, padding = words[:, : len(lengths)], words[:, len(lengths) :]
    assert (padding[ROW] == PADDING_ROW).all()
    assert not padding[[each for each in range(6) if each != ROW]].any()
    assert sorted(real[ROW]) == list(range(len(lengths)))
    assert (real[SLOT] >= LIMITS.block_tokens).all() and len(set(real[SLOT])) == len(lengths)
    for index, draw in zip(flat.sampled, flat.draws, strict=True):
        temperature = real[TEMPERATURE].view(np.float64)[index]
        assert temperature == draw.sampling.temperature
        if temperature:
            assert int(real[KEY].view(np.uint64)[index]) == row_key(draw.sampling.seed, draw.position)


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRunner, ModelRunner]:
    """The same model run from the host, and through padded graphs."""
    torch.set_num_threads(1)
    source: Path = make_llama(tmp_path_factory.mktemp("models") / "llama", seed=10)
    graphs = DeviceSupport(transfer=HostTransfer(), graphs=EagerBackend())
    return make_runner(source, LIMITS), make_runner(source, LIMITS, graphs)


def free_all(count: int) -> StepPlan:
    return StepPlan(step=3, freed_rows=tuple(range(count)), new_rows=(), rows=())


@settings(derandomize=True, max_examples=25, deadline=None)
@given(lengths_of_rows, samplings_of_rows)
def test_a_padded_batch_gives_the_logits_and_tokens_of_the_batch_itself(
    runners: tuple[ModelRunner, ModelRunner], lengths: list[int], samplings: list[SamplingParams]
) -> None:
    plain, padded = runners
    prompts, decodes = make_plan(lengths, samplings[: len(lengths)])
    for runner in runners:
        runner.launch(prompts).result()
    with torch.inference_mode():
        plain._rows.apply(decodes)
        batch = plain._rows.batch(decodes)
        wanted, _ = plain.decoder.logits(batch)
        assert padded._steps is not None and padded._steps.graphs is not None
        graphs = padded._steps.graphs
        padded._rows.apply(decodes)
        flat = padded._rows.flatten(decodes)
        size = bucket_of(len(lengths), graphs.sizes)
        words = decode_words(flat, size=size, padding_row=PADDING_ROW)
        logits, _ = graphs.replay(torch.from_numpy(words))
        torch.testing.assert_close(logits[torch.tensor(flat.sampled)], wanted, rtol=1e-4, atol=1e-4)
    ours, theirs = (runner.launch(decodes).result().sampled_ids for runner in runners)
    assert ours == theirs
    for runner in runners:
        runner.launch(free_all(len(lengths))).result()
