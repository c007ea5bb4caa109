"""The next tokens, from logits whose vocabulary is spread over the ranks.

Sampling is an argmax too: of logit + temperature x noise, where the noise (Gumbel) is a hash of seed,
position and token id. It therefore depends on neither the batch, nor the rank, nor the device, and a sequence
continued elsewhere draws the same tokens. Ranks exchange one (score, id) pair per row; whole logits only for
rows with top-k, top-p or min-p. Shape letters: S rows, V local vocabulary, W whole vocabulary, R ranks,
M rows that are filtered, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from replicas.parallel.collectives import Collectives
from replicas.parallel.degrees import VOCAB_GRANULE, Shard
from replicas.rank.batch import Draw
from replicas.rank.transfer import Part, Upload

NOT_FINITE = -1
"""The id of a row whose logits were not all finite."""
MAX_VOCAB = 2**24
"""Ids travel as float32 beside their scores, exact up to here."""
_NUCLEUS_CANDIDATES = 1024
"""Top-p looks at this many best tokens first; only a flatter distribution sorts the whole vocabulary."""
_MASK64 = 2**64 - 1
_UNIT = 2.0**-31 * (1.0 - 2.0**-24)
"""Just below 2**-31: the largest hashes round up to 2**31, and no noise may be minus infinity."""


class Peaks(Protocol):
    """The best of every row of logits: in torch here, in one pass by a compiled kernel."""

    def __call__(self, logits_SV: torch.Tensor, num_valid: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Score [S], NaN where one of the first `num_valid` is not finite; column [S] of the first best."""


class BestTokens(Protocol):
    """The best token of every row of a rank's logits: in torch here, in one pass by a device kernel."""

    def __call__(
        self,
        logits_SV: torch.Tensor,
        *,
        num_valid: int,
        first_id: int,
        keys_S2: torch.Tensor,
        temperatures_S: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score [S], NaN where a logit is not finite, and column [S] of the first best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which of the hot rows keep only likely tokens, and how many candidates tell which those are."""

    among_M: Part
    top_k_M1: Part
    temperature_M1: Part
    top_p_M1: Part
    min_p_M1: Part
    most_top_k: int
    has_top_p: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the rows of a step are drawn, staged for the device. `hot_S` None: all of them are greedy."""

    hot_S: Part | None = None
    keys_S2: Part | None = None
    temperature_S1: Part | None = None
    filters: Filters | None = None


def stage_sampling(draws: Sequence[Draw], upload: Upload) -> Sampling:
    """What `draw_tokens` needs, on its way to the device."""
    hot = [index for index, draw in enumerate(draws) if not draw.sampling.is_greedy]
    if not hot:
        return Sampling()
    hot_draws = [draws[index] for index in hot]
    return Sampling(
        hot_S=upload.integers(hot),
        keys_S2=upload.add(row_keys(hot_draws)),
        temperature_S1=_column(upload, [draw.sampling.temperature for draw in hot_draws]),
        filters=_stage_filters(hot_draws, upload),
    )


def sample(
    logits_SV: torch.Tensor, draws: Sequence[Draw], shard: Shard, collectives: Collectives
) -> torch.Tensor:
    """`draw_tokens` where the device is the host."""
    upload = Upload()
    sampling = stage_sampling(draws, upload)
    upload.send()
    return draw_tokens(logits_SV, sampling, shard, collectives)


def peaks(logits_SV: torch.Tensor, num_valid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`Peaks` in torch."""
    score_S, column_S = _argmax(logits_SV)
    return score_S.masked_fill(~_is_finite(logits_SV, num_valid), torch.nan), column_S


def draw_tokens(
    logits_SV: torch.Tensor,
    sampling: Sampling,
    shard: Shard,
    collectives: Collectives,
    find_peaks: Peaks = peaks,
) -> torch.Tensor:
    """One id per row, the same on every rank: int64 [S]. Lowest id of equal scores; NOT_FINITE per row."""
    assert shard.vocab_ranks * shard.vocab_rows <= MAX_VOCAB, shard
    if sampling.hot_S is None:
        score_S, column_S = find_peaks(logits_SV, shard.vocab_valid)
    else:
        is_finite_S = _is_finite(logits_SV, shard.vocab_valid)
        score_S, column_S = _argmax(_with_noise(logits_SV, sampling, shard, collectives))
        score_S = score_S.masked_fill(~is_finite_S, torch.nan)
    return _agree(score_S, column_S + shard.vocab_start, collectives)


def pick_tokens(
    logits_SV: torch.Tensor,
    keys_S2: torch.Tensor,
    temperatures_S: torch.Tensor,
    shard: Shard,
    collectives: Collectives,
    best_tokens: BestTokens,
) -> torch.Tensor:
    """`draw_tokens` for rows without filters, greedy ones (temperature 0) among them, in fixed shapes that a
    graph can replay."""
    score_S, index_S = best_tokens(
        logits_SV,
        num_valid=shard.vocab_valid,
        first_id=shard.vocab_start,
        keys_S2=keys_S2,
        temperatures_S=temperatures_S,
    )
    return _agree(score_S, index_S.to(torch.int64) + shard.vocab_start, collectives)


def best_tokens(
    logits_SV: torch.Tensor,
    *,
    num_valid: int,
    first_id: int,
    keys_S2: torch.Tensor,
    temperatures_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and column of the best token of every row; NaN for a row that is not finite."""
    temperatures_S1 = temperatures_S.unsqueeze(1)
    noise_SV = gumbel_noise(keys_S2, first_id, logits_SV.shape[1])
    noisy_SV = noise_SV.mul_(temperatures_S1).add_(logits_SV)
    # Not by adding zero times the noise: that may be infinite.
    score_S, index_S = _argmax(torch.where(temperatures_S1 > 0, noisy_SV, logits_SV))
    return score_S.masked_fill(~_is_finite(logits_SV, num_valid), torch.nan), index_S


def gumbel_noise(keys_S2: torch.Tensor, first_id: int, count: int) -> torch.Tensor:
    """float32 [S, count]: noise of the token ids from `first_id` on, from 31 hashed bits each."""
    low_S1, high_S1 = keys_S2[:, :1], keys_S2[:, 1:]
    ids_V = _mix32_(torch.arange(first_id, first_id + count, dtype=torch.int32, device=keys_S2.device))
    hashed_SV = _mix32_(_mix32_(ids_V ^ low_S1).add_(high_S1)).bitwise_and_(0x7FFF_FFFF)
    uniform_SV = hashed_SV.to(torch.float32).add_(0.5).mul_(_UNIT)
    # -log1p(-u) is exponential, and exact where it is small: there lie the winners.
    return uniform_SV.neg_().log1p_().neg_().log_().neg_()


def row_keys(draws: Sequence[Draw]) -> npt.NDArray[np.int32]:
    """int32 [S, 2]: low and high half of what keys the noise of a row."""
    keys = [row_key(draw.sampling.seed, draw.position) for draw in draws]
    return np.array(keys, dtype=np.uint64).view(np.int32).reshape(-1, 2)


def _is_finite(logits_SV: torch.Tensor, num_valid: int) -> torch.Tensor:
    """A sum is finite if and only if all terms are (short of overflow), and is the cheapest pass there is."""
    return logits_SV[:, :num_valid].sum(dim=1).isfinite()


def _agree(score_S: torch.Tensor, id_S: torch.Tensor, collectives: Collectives) -> torch.Tensor:
    """The id of the best score over all ranks; NOT_FINITE where a score is NaN on any."""
    if collectives.size > 1:
        pairs_RS2 = collectives.all_gather(torch.stack((score_S, id_S.to(torch.float32)), dim=1))
        score_S, best_S = pairs_RS2[:, :, 0].max(dim=0)
        id_S = pairs_RS2[:, :, 1].gather(0, best_S.unsqueeze(0)).squeeze(0).to(torch.int64)
    return id_S.masked_fill(score_S.isnan(), NOT_FINITE)


def _with_noise(
    logits_SV: torch.Tensor, sampling: Sampling, shard: Shard, collectives: Collectives
) -> torch.Tensor:
    """Replace the logits of hot rows by noisy scores, -inf for tokens that a filter leaves out."""
    assert sampling.hot_S is not None and sampling.keys_S2 is not None and sampling.temperature_S1 is not None
    index_S = sampling.hot_S.tensor
    hot_SV = logits_SV.index_select(0, index_S)
    noise_SV = gumbel_noise(sampling.keys_S2.tensor, shard.vocab_start, shard.vocab_rows)
    scores_SV = noise_SV.mul_(sampling.temperature_S1.tensor).add_(hot_SV)
    if sampling.filters is not None:
        among_M = sampling.filters.among_M.tensor
        part_MV = hot_SV.index_select(0, among_M)
        whole_MW = collectives.all_gather(part_MV).transpose(0, 1).flatten(1)
        floor_M1 = _floors(whole_MW, sampling.filters)
        kept_MV = scores_SV.index_select(0, among_M).masked_fill_(part_MV < floor_M1, -torch.inf)
        scores_SV.index_copy_(0, among_M, kept_MV)
    return logits_SV.index_copy(0, index_S, scores_SV)


def _stage_filters(hot: Sequence[Draw], upload: Upload) -> Filters | None:
    among = [index for index, draw in enumerate(hot) if draw.sampling.has_filter]
    if not among:
        return None
    samplings = [hot[index].sampling for index in among]
    top_k = [sampling.top_k or MAX_VOCAB for sampling in samplings]
    return Filters(
        among_M=upload.integers(among),
        top_k_M1=upload.integers([[k] for k in top_k]),
        temperature_M1=_column(upload, [sampling.temperature for sampling in samplings]),
        top_p_M1=_column(upload, [sampling.top_p for sampling in samplings]),
        min_p_M1=_column(upload, [sampling.min_p for sampling in samplings]),
        most_top_k=max((k for k in top_k if k < MAX_VOCAB), default=1),
        has_top_p=any(sampling.top_p < 1.0 for sampling in samplings),
    )


def _floors(logits_MW: torch.Tensor, filters: Filters) -> torch.Tensor:
    """The lowest logit each row keeps, [M, 1]: top-k first, top-p within it, and min-p. Ties are kept."""
    vocab_size = logits_MW.shape[1]
    needed = min(filters.most_top_k, vocab_size)
    if filters.has_top_p:
        # Looking whether candidates suffice would wait for a device; a sort there is cheap.
        is_on_host = logits_MW.device.type == "cpu"
        needed = min(max(needed, _NUCLEUS_CANDIDATES), vocab_size) if is_on_host else vocab_size
    k_M1 = filters.top_k_M1.tensor.clamp(max=vocab_size)
    temperature_M1, top_p_M1 = filters.temperature_M1.tensor, filters.top_p_M1.tensor
    while True:
        best_MK = logits_MW.topk(needed, dim=1).values
        kept_M1, is_enough_M1 = _num_kept(logits_MW, best_MK, k_M1, temperature_M1, top_p_M1)
        if needed == vocab_size or not filters.has_top_p or bool(is_enough_M1.all()):
            break
        needed = vocab_size
    floor_M1 = best_MK.gather(1, (kept_M1 - 1).clamp_(0, needed - 1))
    is_open_M1 = (top_p_M1 >= 1.0) & (k_M1 >= vocab_size)
    floor_M1 = floor_M1.masked_fill_(is_open_M1, -torch.inf)
    # p >= min_p * p_best, as logits; log(0) leaves everything in.
    return torch.maximum(floor_M1, best_MK[:, :1] + temperature_M1 * filters.min_p_M1.tensor.log())


def _num_kept(
    logits_MW: torch.Tensor,
    best_MK: torch.Tensor,
    k_M1: torch.Tensor,
    temperature_M1: torch.Tensor,
    top_p_M1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the best tokens each row keeps, and whether the candidates were enough to tell."""
    rank_1K = torch.arange(best_MK.shape[1], device=best_MK.device).unsqueeze(0)
    is_in_k_MK = rank_1K < k_M1
    # Relative to the best logit, so that a tiny temperature gives -inf, never inf - inf.
    mass_MK = ((best_MK - best_MK[:, :1]) / temperature_M1).exp_()
    whole_M1 = ((logits_MW - best_MK[:, :1]) / temperature_M1).exp_().sum(dim=1, keepdim=True)
    in_k_M1 = (mass_MK * is_in_k_MK).sum(dim=1, keepdim=True)
    total_M1 = torch.where(k_M1 < logits_MW.shape[1], in_k_M1, whole_M1)
    before_MK = mass_MK.cumsum(dim=1) - mass_MK
    is_kept_MK = is_in_k_MK & ((before_MK < top_p_M1 * total_M1) | (top_p_M1 >= 1.0))
    kept_M1 = is_kept_MK.sum(dim=1, keepdim=True).clamp_(min=1)
    is_enough_M1 = (kept_M1 < best_MK.shape[1]) | (k_M1 <= best_MK.shape[1]) | (top_p_M1 >= 1.0)
    return kept_M1, is_enough_M1


def _argmax(scores_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best score and its first index per row. In two levels: a max without index is ten times cheaper."""
    blocks = scores_SV.view(scores_SV.shape[0], -1, VOCAB_GRANULE)
    score_S, block_S = blocks.amax(dim=2).max(dim=1)
    index = block_S.view(-1, 1, 1).expand(-1, 1, VOCAB_GRANULE)
    within_S = blocks.gather(1, index).squeeze(1).argmax(dim=1)
    return score_S, block_S * VOCAB_GRANULE + within_S


def _column(upload: Upload, values: list[float]) -> Part:
    return upload.floats([[value] for value in values])


def row_key(seed: int, position: int) -> int:
    """64 well-mixed bits of (seed, position): two rounds of splitmix64."""
    return _splitmix64(_splitmix64(seed & _MASK64) ^ (position & _MASK64))


def _splitmix64(state: int) -> int:
    state = (state + 0x9E37_79B9_7F4A_7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK64
    return state ^ (state >> 31)


def _signed(word: int) -> int:
    """The low 32 bits as a two's complement number."""
    return ((word & 0xFFFF_FFFF) ^ 0x8000_0000) - 0x8000_0000


def _mix32_(x: torch.Tensor) -> torch.Tensor:
    """An int32 hash (lowbias32), in place; the masks make arithmetic shifts logical ones."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB_352D
    x ^= (x >> 15) & 0x1_FFFF
    x *= _signed(0x846C_A68B)
    x ^= (x >> 16) & 0xFFFF
    return x
