"""Cases of the expert kernels: routing, lists, grouped products of empty and crowded experts, and the sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from bench.gpu_check.case import KernelCase, Tensors, draw, size_bytes
from replicas.layers.triton.combine import combine_experts
from replicas.layers.triton.expert_lists import list_pairs
from replicas.layers.triton.grouped_linear import PairLists, down_experts, gated_experts
from replicas.layers.triton.router import choose_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """All experts, those of this rank from `first_expert` on, choices per token, and the sizes of one."""

    num_experts: int
    num_local: int
    first_expert: int
    num_choices: int
    hidden: int
    size: int

    def __str__(self) -> str:
        return (
            f"{self.num_local} of {self.num_experts} experts, {self.num_choices} each, "
            f"{self.hidden} x {self.size}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Routed:
    choices: torch.Tensor
    shares: torch.Tensor
    lists: PairLists
    is_local: torch.Tensor


def router_case(
    tokens: int, num_experts: int, num_choices: int, *, dtype: torch.dtype, device: torch.device
) -> KernelCase:
    """Whole numbers, so that ties are many; the lower expert wins them. The second token is padding."""
    logits = draw((tokens, num_experts), torch.float32, device, seed=1, scale=3.0).round().to(dtype)
    slots = torch.arange(tokens, 0, -1, device=device)
    slots[1:2] = 0

    def reference() -> Tensors:
        top, choices = logits.double().sort(dim=1, descending=True, stable=True)
        choices = choices.int().masked_fill(slots.unsqueeze(1) == 0, -1)
        return choices[:, :num_choices], top[:, :num_choices].softmax(dim=1)

    return KernelCase(
        kernel="router top-k",
        shape=f"{tokens} tokens, {num_choices} of {num_experts}",
        dtype=dtype,
        launch=lambda: choose_experts(logits, slots, num_choices),
        results=lambda: choose_experts(logits, slots, num_choices),
        reference=reference,
        num_bytes=size_bytes(logits) + tokens * num_choices * 8,
    )


def lists_case(tokens: int, shape: ExpertShape, *, device: torch.device) -> KernelCase:
    choices, _ = _choose(tokens, shape, device)
    counts = torch.empty(shape.num_experts, dtype=torch.int32, device=device)

    def run() -> torch.Tensor:
        return list_pairs(choices, counts, first_expert=shape.first_expert, num_local=shape.num_local)

    def results() -> Tensors:
        pairs = run().clone()
        place = torch.arange(tokens, device=device)
        local = slice(shape.first_expert, shape.first_expert + shape.num_local)
        return pairs.masked_fill(place >= counts[local, None], -1), counts.clone()

    def reference() -> Tensors:
        flat = choices.flatten()
        pairs = torch.full((shape.num_local, tokens), -1, dtype=torch.int32, device=device)
        for local in range(shape.num_local):
            mine = (flat == shape.first_expert + local).nonzero().flatten()
            pairs[local, : len(mine)] = mine.int()
        return pairs, torch.bincount(flat, minlength=shape.num_experts).int()

    return KernelCase(
        kernel="expert lists",
        shape=f"{tokens} tokens, {shape}",
        dtype=torch.float32,
        launch=run,
        results=results,
        reference=reference,
        num_bytes=2 * size_bytes(choices),
    )


def gated_case(tokens: int, shape: ExpertShape, *, dtype: torch.dtype, device: torch.device) -> KernelCase:
    routed = _route(tokens, shape, device)
    x = draw((tokens, shape.hidden), dtype, device, seed=2)
    weights = draw(
        (shape.num_local, 2 * shape.size, shape.hidden), dtype, device, seed=3, scale=shape.hidden**-0.5
    )

    def results() -> Tensors:
        return (gated_experts(x, weights, routed.lists)[routed.is_local],)

    def reference() -> Tensors:
        rows = x.repeat_interleave(shape.num_choices, 0)
        product = _per_pair(rows, weights, routed, shape)
        gate, up = product[routed.is_local].chunk(2, dim=1)
        return (functional.silu(gate) * up,)

    return KernelCase(
        kernel="experts gate and up",
        shape=f"{tokens} tokens, {shape}",
        dtype=dtype,
        launch=lambda: gated_experts(x, weights, routed.lists),
        results=results,
        reference=reference,
        num_bytes=_weights_hit(routed, shape) * 2 * shape.size * shape.hidden * dtype.itemsize,
        num_flops=4 * int(routed.is_local.sum()) * shape.size * shape.hidden,
    )


def down_case(tokens: int, shape: ExpertShape, *, dtype: torch.dtype, device: torch.device) -> KernelCase:
    """The down product and the weighted sum after it."""
    routed = _route(tokens, shape, device)
    hidden = draw((tokens * shape.num_choices, shape.size), dtype, device, seed=4)
    hidden[~routed.is_local] = torch.nan
    weights = draw((shape.num_local, shape.hidden, shape.size), dtype, device, seed=5, scale=shape.size**-0.5)

    def run() -> torch.Tensor:
        y = down_experts(hidden, weights, routed.lists)
        return combine_experts(
            y, routed.choices, routed.shares, first_expert=shape.first_expert, num_local=shape.num_local
        )

    def reference() -> Tensors:
        y = _per_pair(hidden.nan_to_num(), weights, routed, shape)
        y[~routed.is_local] = 0.0
        shared = y.view(tokens, shape.num_choices, -1) * routed.shares.double()[:, :, None]
        return (shared.sum(1),)

    return KernelCase(
        kernel="experts down and sum",
        shape=f"{tokens} tokens, {shape}",
        dtype=dtype,
        launch=run,
        results=lambda: (run(),),
        reference=reference,
        num_bytes=_weights_hit(routed, shape) * shape.size * shape.hidden * dtype.itemsize,
        num_flops=2 * int(routed.is_local.sum()) * shape.size * shape.hidden,
    )


def _choose(tokens: int, shape: ExpertShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A skewed routing: some experts are crowded, some stay empty."""
    logits = draw((tokens, shape.num_experts), torch.float32, device, seed=6)
    logits += torch.linspace(2.0, -2.0, shape.num_experts, device=device)
    return choose_experts(logits, torch.arange(1, tokens + 1, device=device), shape.num_choices)


def _route(tokens: int, shape: ExpertShape, device: torch.device) -> _Routed:
    choices, shares = _choose(tokens, shape, device)
    counts = torch.empty(shape.num_experts, dtype=torch.int32, device=device)
    pairs = list_pairs(choices, counts, first_expert=shape.first_expert, num_local=shape.num_local)
    local = choices.flatten() - shape.first_expert
    return _Routed(
        choices=choices,
        shares=shares,
        lists=PairLists(
            pairs_ET=pairs, counts_X=counts, first_expert=shape.first_expert, num_choices=shape.num_choices
        ),
        is_local=(local >= 0) & (local < shape.num_local),
    )


def _per_pair(rows: torch.Tensor, weights: torch.Tensor, routed: _Routed, shape: ExpertShape) -> torch.Tensor:
    """Every pair's row times its expert's matrix in float64; other ranks' pairs are zero."""
    out = torch.zeros((len(rows), weights.shape[1]), dtype=torch.float64, device=rows.device)
    local = routed.choices.flatten() - shape.first_expert
    for expert in range(shape.num_local):
        mine = local == expert
        out[mine] = rows[mine].double() @ weights[expert].double().t()
    return out


def _weights_hit(routed: _Routed, shape: ExpertShape) -> int:
    local = routed.lists.counts_X[shape.first_expert : shape.first_expert + shape.num_local]
    return int((local > 0).sum())
