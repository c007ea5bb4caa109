"""The next tokens, from logits whose vocabulary is spread over the ranks.

Sampling is an argmax too: of logit + temperature x noise, where the noise (Gumbel) is a hash of seed,
position and token id. It therefore depends on neither the batch, nor the rank, nor the device, and a sequence
continued elsewhere draws the same tokens. Ranks exchange one (score, id) pair per row; whole logits only for
rows with top-k, top-p or min-p. Shape letters: S rows, V local vocabulary, W whole vocabulary, R ranks,
M rows that are filtered, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from replicas.parallel.collectives import Collectives
from replicas.parallel.degrees import VOCAB_GRANULE, Shard
from replicas.rank.batch import Draw

NOT_FINITE = -1
"""The id of a row whose logits were not all finite."""
MAX_VOCAB = 2**24
"""Ids travel as float32 beside their scores, exact up to here."""
_NUCLEUS_CANDIDATES = 1024
"""Top-p looks at this many best tokens first; only a flatter distribution sorts the whole vocabulary."""
_MASK64 = 2**64 - 1
_UNIT = 2.0**-31


def sample(
    logits_SV: torch.Tensor, draws: Sequence[Draw], shard: Shard, collectives: Collectives
) -> torch.Tensor:
    """One id per row, the same on every rank: int64 [S]. Lowest id of equal scores; NOT_FINITE per row."""
    assert shard.vocab_ranks * shard.vocab_rows <= MAX_VOCAB, shard
    # A sum is finite if and only if all terms are (short of overflow), and is the cheapest pass there is.
    is_finite_S = logits_SV[:, : shard.vocab_valid].sum(dim=1).isfinite()
    hot = [index for index, draw in enumerate(draws) if not draw.sampling.is_greedy]
    if hot:
        logits_SV = _with_noise(logits_SV, draws, hot, shard, collectives)
    score_S, id_S = _argmax(logits_SV)
    id_S += shard.vocab_start
    score_S = score_S.masked_fill(~is_finite_S, torch.nan)
    if collectives.size > 1:
        pairs_RS2 = collectives.all_gather(torch.stack((score_S, id_S.to(torch.float32)), dim=1))
        score_S, best_S = pairs_RS2[:, :, 0].max(dim=0)
        id_S = pairs_RS2[:, :, 1].gather(0, best_S.unsqueeze(0)).squeeze(0).to(torch.int64)
    return id_S.masked_fill(score_S.isnan(), NOT_FINITE)


def gumbel_noise(draws: Sequence[Draw], first_id: int, count: int, device: torch.device) -> torch.Tensor:
    """float32 [len(draws), count]: noise of the token ids from `first_id` on, from 31 hashed bits each."""
    keys = [_row_key(draw.sampling.seed, draw.position) for draw in draws]
    low_S1 = torch.tensor([[_signed(key)] for key in keys], dtype=torch.int32, device=device)
    high_S1 = torch.tensor([[_signed(key >> 32)] for key in keys], dtype=torch.int32, device=device)
    ids_V = _mix32_(torch.arange(first_id, first_id + count, dtype=torch.int32, device=device))
    hashed_SV = _mix32_(_mix32_(ids_V ^ low_S1).add_(high_S1)).bitwise_and_(0x7FFF_FFFF)
    uniform_SV = hashed_SV.to(torch.float32).add_(0.5).mul_(_UNIT)
    # -log1p(-u) is exponential, and exact where it is small: there lie the winners.
    return uniform_SV.neg_().log1p_().neg_().log_().neg_()


def _with_noise(
    logits_SV: torch.Tensor, draws: Sequence[Draw], hot: list[int], shard: Shard, collectives: Collectives
) -> torch.Tensor:
    """Replace the logits of rows `hot` by noisy scores, -inf for tokens that a filter leaves out."""
    device = logits_SV.device
    hot_draws = [draws[index] for index in hot]
    index_S = torch.tensor(hot, dtype=torch.int64, device=device)
    hot_SV = logits_SV.index_select(0, index_S)
    temperature_S1 = _column([draw.sampling.temperature for draw in hot_draws], device)
    scores_SV = gumbel_noise(hot_draws, shard.vocab_start, shard.vocab_rows, device).mul_(temperature_S1)
    scores_SV += hot_SV
    filtered = [index for index, draw in enumerate(hot_draws) if _is_filtered(draw)]
    if filtered:
        filtered_M = torch.tensor(filtered, dtype=torch.int64, device=device)
        part_MV = hot_SV.index_select(0, filtered_M)
        whole_MW = collectives.all_gather(part_MV).transpose(0, 1).flatten(1)
        floor_M1 = _floors(whole_MW, [hot_draws[index] for index in filtered])
        kept_MV = scores_SV.index_select(0, filtered_M).masked_fill_(part_MV < floor_M1, -torch.inf)
        scores_SV.index_copy_(0, filtered_M, kept_MV)
    return logits_SV.index_copy(0, index_S, scores_SV)


def _is_filtered(draw: Draw) -> bool:
    sampling = draw.sampling
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _floors(logits_MW: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The lowest logit each row keeps, [M, 1]: top-k first, top-p within it, and min-p. Ties are kept."""
    vocab_size = logits_MW.shape[1]
    top_k = [min(draw.sampling.top_k or vocab_size, vocab_size) for draw in draws]
    needed = max((k for k in top_k if k < vocab_size), default=1)
    if any(draw.sampling.top_p < 1.0 for draw in draws):
        needed = max(needed, min(_NUCLEUS_CANDIDATES, vocab_size))
        if logits_MW.is_cuda:
            # Looking whether candidates suffice would wait for the device; a sort there is cheap.
            needed = vocab_size
    k_M1 = torch.tensor([[k] for k in top_k], dtype=torch.int64, device=logits_MW.device)
    temperature_M1 = _column([draw.sampling.temperature for draw in draws], logits_MW.device)
    top_p_M1 = _column([draw.sampling.top_p for draw in draws], logits_MW.device)
    while True:
        best_MK = logits_MW.topk(needed, dim=1).values
        kept_M1, is_enough_M1 = _num_kept(logits_MW, best_MK, k_M1, temperature_M1, top_p_M1)
        if needed == vocab_size or bool(is_enough_M1.all()):
            break
        needed = vocab_size
    floor_M1 = best_MK.gather(1, (kept_M1 - 1).clamp_(0, needed - 1))
    is_open_M1 = (top_p_M1 >= 1.0) & (k_M1 >= vocab_size)
    floor_M1 = floor_M1.masked_fill_(is_open_M1, -torch.inf)
    # p >= min_p * p_best, as logits; log(0) leaves everything in.
    min_p_M1 = _column([draw.sampling.min_p for draw in draws], logits_MW.device)
    return torch.maximum(floor_M1, best_MK[:, :1] + temperature_M1 * min_p_M1.log())


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


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)


def _row_key(seed: int, position: int) -> int:
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
