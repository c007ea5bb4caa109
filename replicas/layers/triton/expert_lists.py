"""Which token-expert pairs each expert gets: one list per expert, in token order.

A token chooses an expert at most once, so a list of T places holds every case: no sort, no offsets between
experts, nothing dropped, and the same lists on every run. One program per expert counts over all pairs.

    choices_TC   int32, global expert numbers; -1 is no expert
    pairs_ET     int32: pair numbers (token * C + choice) of each local expert; beyond its count undefined
    counts_X     int32: pairs of every expert, of other ranks' too

Shape letters: T tokens, C choices per token, X all experts, E local experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from replicas.layers.triton.launch import power_of_two

_MAX_TILE = 4096


def list_pairs(
    choices_TC: torch.Tensor, counts_X: torch.Tensor, *, first_expert: int, num_local: int
) -> torch.Tensor:
    """`pairs_ET`; fills `counts_X`."""
    tokens, num_choices = choices_TC.shape
    pairs_ET = torch.empty((num_local, tokens), device=choices_TC.device, dtype=torch.int32)
    tile = min(_MAX_TILE, power_of_two(tokens * num_choices, 128))
    _list_pairs[(counts_X.shape[0],)](
        choices_TC,
        pairs_ET,
        counts_X,
        tokens,
        tokens * num_choices,
        first_expert,
        num_local,
        TILE_M=tile,
        num_warps=max(1, min(8, tile // 512)),
    )
    return pairs_ET


@triton.jit(do_not_specialize=["tokens", "num_pairs", "first_expert", "num_local"])
def _list_pairs(
    choices_ptr, pairs_ptr, counts_ptr, tokens, num_pairs, first_expert, num_local, TILE_M: tl.constexpr
):
    expert = tl.program_id(0)
    local = expert - first_expert
    is_local = (local >= 0) & (local < num_local)
    count = 0
    for start in range(0, num_pairs, TILE_M):
        pair = start + tl.arange(0, TILE_M)
        chosen = tl.load(choices_ptr + pair, mask=pair < num_pairs, other=-1)
        is_mine = chosen == expert
        mine = is_mine.to(tl.int32)
        place = count + tl.cumsum(mine, 0) - 1
        tl.store(pairs_ptr + local.to(tl.int64) * tokens + place, pair, mask=is_mine & is_local)
        count += tl.sum(mine, 0)
    tl.store(counts_ptr + expert, count)
