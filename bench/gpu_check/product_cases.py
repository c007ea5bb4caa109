"""Cases of torch's own matrix products at the shapes of a step: most of a step's time is theirs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from bench.gpu_check.case import KernelCase, draw, rotated, size_bytes

_SHAPES = (
    (3072, 2048),
    (2048, 2048),
    (16_384, 2048),
    (2048, 8192),
    (6144, 4096),
    (4096, 4096),
    (28_672, 4096),
    (4096, 14_336),
    (128_256, 4096),
    (2048, 1024),
    (1024, 1024),
)
"""(outputs, inputs) of Llama-3.2-1B, Llama-3.1-8B, and Granite outside its experts."""
_TOKENS = (1, 8, 64, 256, 2048)


def product_cases(dtype: torch.dtype, device: torch.device) -> Iterator[partial[KernelCase]]:
    """One token first: those are compared with the fused kernels."""
    for tokens in _TOKENS:
        for num_rows, hidden in _SHAPES:
            if tokens < 2048 or num_rows < 100_000:
                yield partial(product_case, tokens, num_rows, hidden, dtype=dtype, device=device)


def product_case(
    tokens: int, num_rows: int, hidden: int, *, dtype: torch.dtype, device: torch.device
) -> KernelCase:
    x = draw((tokens, hidden), dtype, device, seed=1)
    weight = draw((num_rows, hidden), dtype, device, seed=2, scale=hidden**-0.5)
    copies = rotated(weight)
    return KernelCase(
        kernel="torch product",
        shape=f"{tokens} tokens, {hidden} to {num_rows}",
        dtype=dtype,
        launch=lambda: functional.linear(x, next(copies)),
        results=lambda: (functional.linear(x, weight),),
        reference=lambda: (x.double() @ weight.double().t(),),
        num_bytes=size_bytes(x, weight) + tokens * num_rows * dtype.itemsize,
        num_flops=2 * tokens * num_rows * hidden,
    )
