"""For one token: its norm, the router's logits, and the choice of experts in one launch.

One program does it all: the router's matrix is some tens of KiB. Logits are rounded to the model's dtype, as
a product of torch rounds them, so that ties are those of `router.py`; norm as in `token_linear.py`.
Shape letters: H hidden, X experts, C choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from replicas.layers.triton.launch import power_of_two
from replicas.layers.triton.router import best_choices

_TILE_ELEMENTS = 16_384


def norm_router(
    x_1H: torch.Tensor,
    norm_H: torch.Tensor,
    router_XH: torch.Tensor,
    counts_X: torch.Tensor,
    *,
    num_choices: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 choices [1, C], best first, and their float32 shares [1, C]; `counts_X` gets 1 for the chosen."""
    num_experts, hidden = router_XH.shape
    choices_1C = torch.empty((1, num_choices), device=x_1H.device, dtype=torch.int32)
    shares_1C = torch.empty((1, num_choices), device=x_1H.device, dtype=torch.float32)
    tile_experts = power_of_two(num_experts, 2)
    _norm_router[(1,)](
        x_1H,
        norm_H,
        router_XH,
        choices_1C,
        shares_1C,
        counts_X,
        eps,
        HIDDEN=hidden,
        EXPERTS=num_experts,
        CHOICES=num_choices,
        TILE_X=tile_experts,
        TILE_C=power_of_two(num_choices, 2),
        TILE_K=min(power_of_two(hidden), max(16, _TILE_ELEMENTS // tile_experts)),
        num_warps=8,
    )
    return choices_1C, shares_1C


@triton.jit
def _norm_router(
    x_ptr,
    norm_ptr,
    weight_ptr,
    choices_ptr,
    shares_ptr,
    counts_ptr,
    eps,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_K: tl.constexpr,
):
    expert = tl.arange(0, TILE_X)
    is_expert = expert < EXPERTS
    depth = tl.arange(0, TILE_K)
    product = tl.zeros([TILE_X, TILE_K], tl.float32)
    square = tl.zeros([TILE_K], tl.float32)
    for start in range(0, HIDDEN, TILE_K):
        is_deep = start + depth < HIDDEN
        weight_from = weight_ptr + expert[:, None] * HIDDEN + start + depth[None, :]
        weight = tl.load(weight_from, mask=is_expert[:, None] & is_deep[None, :], other=0.0)
        x = tl.load(x_ptr + start + depth, mask=is_deep, other=0.0).to(tl.float32)
        norm = tl.load(norm_ptr + start + depth, mask=is_deep, other=0.0).to(tl.float32)
        product += weight.to(tl.float32) * (x * norm)[None, :]
        square += x * x
    inverse = tl.rsqrt(tl.sum(square, 0) / HIDDEN + eps)
    logit = (tl.sum(product, 1) * inverse).to(x_ptr.dtype.element_ty).to(tl.float32)
    chosen, share, left = best_choices(logit[None, :], EXPERTS, CHOICES, 1, TILE_X, TILE_C)
    choice = tl.arange(0, TILE_C)[None, :]
    tl.store(choices_ptr + choice, chosen, mask=choice < CHOICES)
    tl.store(shares_ptr + choice, share, mask=choice < CHOICES)
    is_taken = (left == float("-inf")).to(tl.int32)
    tl.store(counts_ptr + expert[None, :], is_taken, mask=is_expert[None, :])
