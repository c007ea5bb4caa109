"""Penalties and biases against a plain loop over tokens; on one rank and on several, alone and in a batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from replicas.parallel.degrees import Shard
from replicas.plan import NewRow
from replicas.rank.batch import Draw
from replicas.rank.logit_edits import Edits, LogitEdits
from replicas.rank.transfer import Upload
from replicas.request import SamplingParams
from tests.shards import make_shard, shard_of_logits

VOCAB_SIZE = 70
PROMPT = (3, 3, 5, 64)
ANSWER = (5, 9, 69, 9)
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(repetition_penalty=0.5, logit_bias=((3, -100.0), (69, 2.5))),
    SamplingParams(presence_penalty=1.25),
    SamplingParams(frequency_penalty=-0.75, temperature=1.0, seed=3),
    SamplingParams(repetition_penalty=1.25, presence_penalty=0.5, frequency_penalty=0.25),
    SamplingParams(logit_bias=((0, 1.0), (17, -1.0))),
)


def reference(logits: list[float], sampling: SamplingParams, answer: tuple[int, ...]) -> list[float]:
    """What the module docstring says, token by token."""
    counts, seen, bias = Counter(answer), {*PROMPT, *answer}, dict(sampling.logit_bias)
    edited = []
    for token_id, logit in enumerate(logits):
        x = logit
        if token_id in seen:
            x = x / sampling.repetition_penalty if x > 0 else x * sampling.repetition_penalty
        if counts[token_id]:
            x -= sampling.presence_penalty + sampling.frequency_penalty * counts[token_id]
        edited.append(x + bias.get(token_id, 0.0))
    return edited


def make_logits(num_rows: int) -> torch.Tensor:
    return 3.0 * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))


def make_draws(rows: list[int]) -> list[Draw]:
    return [Draw(row=row, sampling=SAMPLINGS[row], position=9) for row in rows]


def apply(edits: LogitEdits, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return edits.apply(logits, stage(edits, rows))


def remember(edits: LogitEdits, rows: list[int], ids: torch.Tensor) -> None:
    """A step that samples `ids` for `rows`."""
    staged = stage(edits, rows)
    edits.apply(torch.zeros(len(rows), edits_rows(edits)), staged)
    edits.remember(staged, ids)


def stage(edits: LogitEdits, rows: list[int]) -> Edits:
    upload = Upload()
    staged = edits.stage(make_draws(rows), upload)
    upload.send()
    return staged


def edits_rows(edits: LogitEdits) -> int:
    return edits._shard.vocab_rows


def make_edits(shard: Shard, *, answered: int) -> LogitEdits:
    """One row per sampling; the first `answered` tokens come as history, the others are sampled."""
    edits = LogitEdits(max_sequences=8, shard=shard, device=torch.device("cpu"))
    for row, sampling in enumerate(SAMPLINGS):
        history = (*PROMPT, *ANSWER[:answered]) if sampling.has_penalties else ()
        edits.set_row(NewRow(row=row, sampling=sampling, history=history, num_prompt=len(PROMPT)))
    rows = list(range(len(SAMPLINGS)))
    for token_id in ANSWER[answered:]:
        remember(edits, rows, torch.full((len(rows),), token_id))
    return edits


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("answered", [0, 3, 4])
def test_edits_are_those_of_the_plain_reference(num_ranks: int, answered: int) -> None:
    rows = [5, 0, 2, 4, 1, 3, 6]
    logits = make_logits(len(rows))
    parts = []
    for rank in range(num_ranks):
        shard = make_shard(VOCAB_SIZE, rank=rank, num_ranks=num_ranks)
        edits = make_edits(shard, answered=answered)
        parts.append(apply(edits, shard_of_logits(logits, shard), rows))
    edited = torch.cat(parts, dim=1)
    assert bool((edited[:, VOCAB_SIZE:] == -torch.inf).all())
    wanted = [reference(logits[at].tolist(), SAMPLINGS[row], ANSWER) for at, row in enumerate(rows)]
    torch.testing.assert_close(edited[:, :VOCAB_SIZE], torch.tensor(wanted))


def test_rows_that_ask_for_nothing_are_the_tensor_that_came() -> None:
    shard = make_shard(VOCAB_SIZE)
    edits = make_edits(shard, answered=2)
    logits = shard_of_logits(make_logits(2), shard)
    assert apply(edits, logits, [0, 0]) is logits


def test_the_given_logits_stay_as_they_are() -> None:
    shard = make_shard(VOCAB_SIZE)
    logits = shard_of_logits(make_logits(2), shard)
    before = logits.clone()
    apply(make_edits(shard, answered=4), logits, [2, 5])
    assert torch.equal(logits, before)


def test_a_row_taken_anew_remembers_nothing() -> None:
    shard = make_shard(VOCAB_SIZE)
    edits = make_edits(shard, answered=4)
    sampling = SAMPLINGS[5]
    edits.set_row(NewRow(row=5, sampling=sampling, history=PROMPT, num_prompt=len(PROMPT)))
    edits.set_row(NewRow(row=2, sampling=SAMPLINGS[0]))
    logits = make_logits(2)
    edited = apply(edits, shard_of_logits(logits, shard), [5, 2])[:, :VOCAB_SIZE]
    assert torch.allclose(edited[0], torch.tensor(reference(logits[0].tolist(), sampling, ())))
    assert torch.equal(edited[1], logits[1])


def test_a_row_whose_logits_were_not_finite_counts_nothing() -> None:
    shard = make_shard(VOCAB_SIZE)
    edits = make_edits(shard, answered=4)
    remember(edits, [5], torch.tensor([-1]))
    logits = make_logits(1)
    edited = apply(edits, shard_of_logits(logits, shard), [5])[0, :VOCAB_SIZE]
    assert torch.allclose(edited, torch.tensor(reference(logits[0].tolist(), SAMPLINGS[5], ANSWER)))
