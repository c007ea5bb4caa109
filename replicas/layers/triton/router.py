"""The router of a mixture of experts: the best experts of every token, and the softmax over their logits.

Granite's routing: top-k of the logits, then a softmax over the chosen ones in float32. Equal logits: the
lower expert. A NaN loses to every number, so that the choices of a token are always distinct and in range.
What pads a captured graph, and writes to slot 0 where no sequence does, goes to no expert.

    logits_TX    float32, bfloat16 or float16
    slots_T      int64: where in the cache a token is written; 0 for padding
    choices_TC   int32, best first, -1 for padding; shares_TC float32

Shape letters: T tokens, X experts, C choices per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from replicas.layers.triton.launch import power_of_two

_TILE_TOKENS = 4


def choose_experts(
    logits_TX: torch.Tensor, slots_T: torch.Tensor, num_choices: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`choices_TC` and `shares_TC`."""
    tokens, num_experts = logits_TX.shape
    choices_TC = torch.empty((tokens, num_choices), device=logits_TX.device, dtype=torch.int32)
    shares_TC = torch.empty((tokens, num_choices), device=logits_TX.device, dtype=torch.float32)
    _choose[(-(-tokens // _TILE_TOKENS),)](
        logits_TX,
        slots_T,
        choices_TC,
        shares_TC,
        logits_TX.stride(0),
        tokens,
        EXPERTS=num_experts,
        CHOICES=num_choices,
        TILE_T=_TILE_TOKENS,
        TILE_X=power_of_two(num_experts, 2),
        TILE_C=power_of_two(num_choices, 2),
        num_warps=1,
    )
    return choices_TC, shares_TC


@triton.jit
def best_choices(
    left,  # [T, X] float32 logits
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Choices and shares [T, C], and what is left of the logits, -inf where an expert was taken."""
    expert = tl.arange(0, TILE_X)
    choice = tl.arange(0, TILE_C)
    # The lowest number stands for NaN and -inf; -inf for what is taken or does not exist.
    left = tl.where(left > -3.4e38, left, -3.4e38)
    left = tl.where(expert[None, :] < EXPERTS, left, float("-inf"))
    chosen = tl.zeros([TILE_T, TILE_C], tl.int32)
    logit = tl.full([TILE_T, TILE_C], float("-inf"), tl.float32)
    for index in tl.static_range(CHOICES):
        best = tl.max(left, 1)
        at = tl.argmax(left, 1, tie_break_left=True)
        chosen = tl.where(choice[None, :] == index, at[:, None], chosen)
        logit = tl.where(choice[None, :] == index, best[:, None], logit)
        left = tl.where(expert[None, :] == at[:, None], float("-inf"), left)
    weight = tl.exp(logit - tl.max(logit, 1)[:, None])
    return chosen, weight / tl.sum(weight, 1)[:, None], left


@triton.jit(do_not_specialize=["tokens"])
def _choose(
    logits_ptr,
    slots_ptr,
    choices_ptr,
    shares_ptr,
    stride,
    tokens,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    expert = tl.arange(0, TILE_X)
    choice = tl.arange(0, TILE_C)
    is_token = token < tokens
    is_real = is_token[:, None] & (expert[None, :] < EXPERTS)
    logits = tl.load(logits_ptr + token[:, None] * stride + expert[None, :], mask=is_real, other=0.0)
    chosen, share, _ = best_choices(logits.to(tl.float32), EXPERTS, CHOICES, TILE_T, TILE_X, TILE_C)
    slot = tl.load(slots_ptr + token, mask=is_token, other=0)
    chosen = tl.where(slot[:, None] == 0, -1, chosen)
    to = token[:, None] * CHOICES + choice[None, :]
    is_out = is_token[:, None] & (choice[None, :] < CHOICES)
    tl.store(choices_ptr + to, chosen, mask=is_out)
    tl.store(shares_ptr + to, share, mask=is_out)
