"""Cases of the kernels for one token: products with the norm before them or the residual behind them."""

from __future__ import annotations

import torch
from torch.nn import functional

from bench.gpu_check.case import KernelCase, Tensors, draw, rotated, size_bytes
from bench.gpu_check.expert_cases import ExpertShape
from replicas.layers.triton.token_add import add_product
from replicas.layers.triton.token_gated import norm_gated
from replicas.layers.triton.token_linear import norm_linear
from replicas.layers.triton.token_router import norm_router

_EPS = 1e-5
_MULTIPLIER = 0.22


def norm_linear_case(num_rows: int, hidden: int, *, dtype: torch.dtype, device: torch.device) -> KernelCase:
    x, norm = _token(hidden, dtype, device)
    weight = draw((num_rows, hidden), dtype, device, seed=3, scale=hidden**-0.5)
    copies = rotated(weight)
    return KernelCase(
        kernel="one token: norm, product",
        shape=f"{hidden} to {num_rows}",
        dtype=dtype,
        launch=lambda: norm_linear(x, norm, next(copies), eps=_EPS),
        results=lambda: (norm_linear(x, norm, weight, eps=_EPS),),
        reference=lambda: (_normed(x, norm) @ weight.double().t(),),
        num_bytes=size_bytes(weight),
    )


def norm_gated_case(size: int, hidden: int, *, dtype: torch.dtype, device: torch.device) -> KernelCase:
    x, norm = _token(hidden, dtype, device)
    weight = draw((2 * size, hidden), dtype, device, seed=4, scale=hidden**-0.5)
    copies = rotated(weight)

    def reference() -> Tensors:
        gate, up = (_normed(x, norm) @ weight.double().t()).chunk(2, dim=1)
        return (functional.silu(gate) * up,)

    return KernelCase(
        kernel="one token: norm, gate and up",
        shape=f"{hidden} to {size}",
        dtype=dtype,
        launch=lambda: norm_gated(x, norm, next(copies), eps=_EPS),
        results=lambda: (norm_gated(x, norm, weight, eps=_EPS),),
        reference=reference,
        num_bytes=size_bytes(weight),
    )


def add_product_case(hidden: int, size: int, *, dtype: torch.dtype, device: torch.device) -> KernelCase:
    x, _ = _token(hidden, dtype, device)
    inputs = draw((1, size), dtype, device, seed=5)
    weight = draw((hidden, size), dtype, device, seed=6, scale=size**-0.5)
    copies = rotated(weight)

    def run(x: torch.Tensor) -> Tensors:
        add_product(x, inputs, next(copies), multiplier=_MULTIPLIER)
        return (x,)

    scratch = x.clone()
    return KernelCase(
        kernel="one token: product, residual",
        shape=f"{size} to {hidden}",
        dtype=dtype,
        launch=lambda: run(scratch),
        results=lambda: run(x.clone()),
        reference=lambda: (x.double() + _MULTIPLIER * (inputs.double() @ weight.double().t()),),
        num_bytes=size_bytes(weight),
    )


def token_router_case(shape: ExpertShape, *, dtype: torch.dtype, device: torch.device) -> KernelCase:
    """The router's rows are units, so that logits are entries of the norm, far from each other."""
    x = torch.linspace(-2.0, 2.0, shape.hidden, device=device).to(dtype)[None]
    norm = torch.ones(shape.hidden, dtype=dtype, device=device)
    order = torch.randperm(shape.num_experts, generator=torch.Generator().manual_seed(2))
    spread = (order * (shape.hidden // shape.num_experts)).to(device)
    router = functional.one_hot(spread, shape.hidden).to(dtype)
    counts = torch.full((shape.num_experts,), 7, dtype=torch.int32, device=device)

    def run() -> Tensors:
        choices, shares = norm_router(x, norm, router, counts, num_choices=shape.num_choices, eps=_EPS)
        return choices, shares, counts

    def reference() -> Tensors:
        logits = (_normed(x, norm) @ router.double().t()).to(dtype).double()
        top, choices = logits.sort(dim=1, descending=True, stable=True)
        chosen = choices[:, : shape.num_choices]
        hit = torch.zeros_like(counts).index_fill_(0, chosen[0], 1)
        return chosen.int(), top[:, : shape.num_choices].softmax(dim=1), hit

    return KernelCase(
        kernel="one token: router",
        shape=str(shape),
        dtype=dtype,
        launch=run,
        results=run,
        reference=reference,
        num_bytes=size_bytes(router),
    )


def token_experts_case(shape: ExpertShape, *, dtype: torch.dtype, device: torch.device) -> KernelCase:
    """Gate and up, down, and the sum into the residual, of chosen experts; the others hold NaN."""
    x, norm = _token(shape.hidden, dtype, device)
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randperm(shape.num_experts, generator=generator)[: shape.num_choices]
    choices = chosen.int().to(device)[None]
    shares = torch.linspace(1.0, 0.1, shape.num_choices, device=device)[None]
    count, hidden, size = shape.num_experts, shape.hidden, shape.size
    gate_up = draw((count, 2 * size, hidden), dtype, device, seed=4, scale=hidden**-0.5)
    down = draw((count, hidden, size), dtype, device, seed=5, scale=size**-0.5)
    others = sorted(set(range(count)) - set(chosen.tolist()))
    gate_up[others], down[others] = torch.nan, torch.nan

    def run(x: torch.Tensor) -> Tensors:
        inner = norm_gated(x, norm, gate_up, eps=_EPS, choices_1C=choices)
        add_product(x, inner, down, multiplier=_MULTIPLIER, choices_1C=choices, shares_1C=shares)
        return (x,)

    def reference() -> Tensors:
        out = torch.zeros_like(x, dtype=torch.float64)
        for expert, share in zip(chosen.tolist(), shares[0].double(), strict=True):
            gate, up = (_normed(x, norm) @ gate_up[expert].double().t()).chunk(2, dim=1)
            out += share * (functional.silu(gate) * up) @ down[expert].double().t()
        return (x.double() + _MULTIPLIER * out,)

    scratch = x.clone()
    return KernelCase(
        kernel="one token: experts, residual",
        shape=str(shape),
        dtype=dtype,
        launch=lambda: run(scratch),
        results=lambda: run(x.clone()),
        reference=reference,
        num_bytes=3 * shape.num_choices * hidden * size * dtype.itemsize,
    )


def _token(hidden: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of activations, and the weights of its norm."""
    return draw((1, hidden), dtype, device, seed=1), draw((hidden,), dtype, device, seed=2)


def _normed(x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide * (wide.square().mean(1, keepdim=True) + _EPS).rsqrt() * norm.double()
