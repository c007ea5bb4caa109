"""The logprobs of sampled or known tokens and of the likeliest alternatives, for the rows that ask for them.

They are the model's own: of the logits as they came, before penalties, biases and temperature. What is said
of a row depends on that row alone. The answer travels as one float32 tensor, so that a device hands it over
with the ids. Shape letters: S sampled rows, V local vocabulary, W whole vocabulary, M rows that ask, K the
most alternatives that any of them asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from replicas.parallel.collectives import Collectives
from replicas.rank.batch import Draw, Target
from replicas.rank.transfer import Part, Upload
from replicas.request import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The draws that ask for logprobs, staged for the device, and the most alternatives asked for."""

    index_M: Part
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedTargets:
    """Tokens that are known and scored, staged for the device."""

    ids_S: Part
    asked: Asked | None


def most_asked(draws: Sequence[Draw | Target]) -> int:
    """The most alternatives that any of them asks for."""
    return max([draw.sampling.num_logprobs or 0 for draw in draws], default=0)


def stage_targets(
    targets: Sequence[Target], upload: Upload, *, most: int | None = None
) -> StagedTargets | None:
    """What `measure_targets` needs; None if there are none."""
    if not targets:
        return None
    return StagedTargets(
        ids_S=upload.integers([target.token_id for target in targets]),
        asked=stage_logprobs(targets, upload, most=most),
    )


def stage_logprobs(
    draws: Sequence[Draw | Target], upload: Upload, *, most: int | None = None
) -> Asked | None:
    """What `measure_logprobs` needs; None if no row asks. `most` None: no more than they ask for."""
    asking = asking_of(draws)
    if not asking:
        return None
    return Asked(index_M=upload.integers(asking), most=most_asked(draws) if most is None else most)


def measure_logprobs(
    logits_SV: torch.Tensor, ids_S: torch.Tensor, asked: Asked | None, collectives: Collectives
) -> torch.Tensor | None:
    """[M, 1 + 2K]: logprob of the sampled id, K best ids, their logprobs; None if no row asks.

    K may be more than any of these rows asks for; `read_logprobs` leaves each with its own.
    Ids are exact in float32: the sampler asserts that a vocabulary is small enough.
    """
    if asked is None:
        return None
    index_M = asked.index_M.tensor
    part_MV = logits_SV.index_select(0, index_M).to(torch.float32)
    whole_MW = collectives.all_gather(part_MV).transpose(0, 1).flatten(1).log_softmax(dim=1)
    # A row without finite logits has id -1; what is said of it is dropped with it.
    sampled_M1 = whole_MW.gather(1, ids_S.index_select(0, index_M).clamp(min=0).unsqueeze(1))
    best_MK, ids_MK = whole_MW.topk(asked.most, dim=1)
    return torch.cat((sampled_M1, ids_MK.to(torch.float32), best_MK), dim=1)


def read_logprobs(
    measured_MK: Sequence[Sequence[float]], draws: Sequence[Draw | Target]
) -> tuple[TokenLogprobs | None, ...]:
    """One entry per draw, None for those that did not ask; from the rows of `measure_logprobs`."""
    said: list[TokenLogprobs | None] = [None] * len(draws)
    for index, row in zip(asking_of(draws), measured_MK, strict=True):
        num_most, count = len(row) // 2, draws[index].sampling.num_logprobs or 0
        ids = [int(token_id) for token_id in row[1 : 1 + count]]
        best = row[1 + num_most : 1 + num_most + count]
        said[index] = TokenLogprobs(logprob=row[0], top=tuple(zip(ids, best, strict=True)))
    return tuple(said)


def measure_targets(
    logits_SV: torch.Tensor, staged: StagedTargets | None, collectives: Collectives
) -> torch.Tensor | None:
    """The same of tokens that are known already."""
    if staged is None:
        return None
    return measure_logprobs(logits_SV, staged.ids_S.tensor, staged.asked, collectives)


def read_scores(
    measured_MK: Sequence[Sequence[float]], targets: Sequence[Target]
) -> tuple[TokenLogprobs, ...]:
    """One entry per target: whoever has their prompt scored asks for logprobs."""
    return tuple(said for said in read_logprobs(measured_MK, targets) if said is not None)


def asking_of(draws: Sequence[Draw | Target]) -> list[int]:
    """Which of them want logprobs."""
    return [index for index, draw in enumerate(draws) if draw.sampling.num_logprobs is not None]
