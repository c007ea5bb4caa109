"""Matrix products, and the shards of them that ranks hold.

A column-parallel linear is `linear` on the rank's own rows of the weight; a row-parallel one adds a sum over
the ranks, which the decoder does. Shape letters: T tokens, I inputs, O outputs, H hidden, F hidden columns of
the MLP, V local vocabulary rows.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from replicas.parallel.collectives import Collectives

_TRANSPOSED_MIN, _TRANSPOSED_MAX = 2, 8
"""Tokens for which the transposed product is 1.1 to 2.5 times as fast on a CPU (float32, AVX2)."""


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x @ weight.T, contiguous; the one place that picks how."""
    if x_TI.device.type == "cpu" and _TRANSPOSED_MIN <= x_TI.shape[0] <= _TRANSPOSED_MAX:
        return torch.mm(weight_OI, x_TI.t()).t().contiguous()
    return functional.linear(x_TI, weight_OI)


def linear_into(out_TO: torch.Tensor, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> None:
    """`linear` on the CPU into a slice of a larger result."""
    if _TRANSPOSED_MIN <= x_TI.shape[0] <= _TRANSPOSED_MAX:
        out_TO.copy_(torch.mm(weight_OI, x_TI.t()).t())
    else:
        torch.mm(x_TI, weight_OI.t(), out=out_TO)


def gate(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the fused product."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return functional.silu(gate_TF).mul_(up_TF)


def embed(
    token_ids_T: torch.Tensor, rows_VH: torch.Tensor, vocab_start: int, collectives: Collectives
) -> torch.Tensor:
    """Look up tokens whose rows are spread over the ranks: each rank gives its own rows, the others zero."""
    if collectives.size == 1:
        return functional.embedding(token_ids_T, rows_VH)
    local_T = token_ids_T - vocab_start
    is_elsewhere_T = (local_T < 0) | (local_T >= rows_VH.shape[0])
    x_TH = functional.embedding(local_T.masked_fill_(is_elsewhere_T, 0), rows_VH)
    return collectives.all_reduce(x_TH.masked_fill_(is_elsewhere_T.unsqueeze(1), 0.0))


def finish_logits(product_TV: torch.Tensor, num_valid: int, divisor: float) -> torch.Tensor:
    """float32 logits of the rank's own vocabulary rows; those of padding rows are -inf."""
    logits_TV = product_TV.float()
    if divisor != 1.0:
        logits_TV /= divisor
    if num_valid < logits_TV.shape[1]:
        logits_TV[:, num_valid:] = -torch.inf
    return logits_TV
