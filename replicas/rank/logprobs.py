"""The logprobs of sampled tokens and of the likeliest alternatives, for the rows that ask for them.

They are the model's own: of the logits as they came, before penalties, biases and temperature. What is said
of a row depends on that row alone. The answer travels as one float32 tensor, so that a device hands it over
with the ids. Shape letters: S sampled rows, V local vocabulary, W whole vocabulary, M rows that ask, K the
most alternatives that any of them asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from replicas.parallel.collectives import Collectives
from replicas.rank.batch import Draw
from replicas.request import TokenLogprobs


def measure_logprobs(
    logits_SV: torch.Tensor,
    ids_S: torch.Tensor,
    draws: Sequence[Draw],
    collectives: Collectives,
    *,
    num_best: int | None = None,
) -> torch.Tensor | None:
    """[M, 1 + 2K]: logprob of the sampled id, K best ids, their logprobs; None if no row asks.

    K is `num_best` where it is given. Rows keep what they asked for in `read_logprobs`.
    Ids are exact in float32: the sampler asserts that a vocabulary is small enough.
    """
    asking = _asking(draws)
    if not asking:
        return None
    index_M = torch.tensor(asking, dtype=torch.int64, device=logits_SV.device)
    part_MV = logits_SV.index_select(0, index_M).to(torch.float32)
    whole_MW = collectives.all_gather(part_MV).transpose(0, 1).flatten(1).log_softmax(dim=1)
    # A row without finite logits has id -1; what is said of it is dropped with it.
    sampled_M1 = whole_MW.gather(1, ids_S.index_select(0, index_M).clamp(min=0).unsqueeze(1))
    if num_best is None:
        num_best = max(draws[index].sampling.num_logprobs or 0 for index in asking)
    best_MK, ids_MK = whole_MW.topk(num_best, dim=1)
    return torch.cat((sampled_M1, ids_MK.to(torch.float32), best_MK), dim=1)


def read_logprobs(
    measured_MK: Sequence[Sequence[float]], draws: Sequence[Draw]
) -> tuple[TokenLogprobs | None, ...]:
    """One entry per draw, None for those that did not ask; from the rows of `measure_logprobs`."""
    said: list[TokenLogprobs | None] = [None] * len(draws)
    for index, row in zip(_asking(draws), measured_MK, strict=True):
        num_most, count = len(row) // 2, draws[index].sampling.num_logprobs or 0
        ids = [int(token_id) for token_id in row[1 : 1 + count]]
        best = row[1 + num_most : 1 + num_most + count]
        said[index] = TokenLogprobs(logprob=row[0], top=tuple(zip(ids, best, strict=True)))
    return tuple(said)


def _asking(draws: Sequence[Draw]) -> list[int]:
    return [index for index, draw in enumerate(draws) if draw.sampling.num_logprobs is not None]
