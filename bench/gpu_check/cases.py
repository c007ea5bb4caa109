"""The catalogue of kernel cases: tiny ones for right and wrong, and those of served shapes for speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.gpu_check.attention_cases import HeadShape, decode_case, prefill_case
from bench.gpu_check.case import KernelCase
from bench.gpu_check.expert_cases import ExpertShape, down_case, gated_case, lists_case, router_case
from bench.gpu_check.layer_cases import add_norm_case, best_token_case, rope_case, swiglu_case
from bench.gpu_check.token_cases import (
    add_product_case,
    norm_gated_case,
    norm_linear_case,
    token_experts_case,
    token_router_case,
)

MakeCase = Callable[[], KernelCase]
"""Cases are made when they run: making one may run other kernels, and one that breaks costs itself alone."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LLAMA_8B = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128, page_tokens=16)
LLAMA_1B = HeadShape(num_heads=32, num_kv_heads=8, head_dim=64, page_tokens=16)
GRANITE = HeadShape(num_heads=16, num_kv_heads=8, head_dim=64, page_tokens=16)
GRANITE_EXPERTS = ExpertShape(
    num_experts=32, num_local=32, first_expert=0, num_choices=8, hidden=1024, size=512
)


def tiny_cases(device: torch.device) -> Iterator[MakeCase]:
    """Odd sizes, tails, empty sequences and foreign experts; seconds in the interpreter.

    The interpreter multiplies no bfloat16 matrices: float16 stands for half precision in those kernels there.
    """
    is_interpreted = device.type != "cuda"
    for dtype in (torch.float32, torch.float16) if is_interpreted else _DTYPES:
        yield from _tiny_product_cases(dtype, device)
    for dtype in _DTYPES:
        yield from _tiny_row_cases(dtype, device)
    half = ExpertShape(num_experts=8, num_local=4, first_expert=2, num_choices=2, hidden=40, size=24)
    yield partial(lists_case, 1, half, device=device)
    yield partial(lists_case, 21, half, device=device)
    yield partial(best_token_case, 3, 4160, num_valid=4133, device=device)


def _tiny_product_cases(dtype: torch.dtype, device: torch.device) -> Iterator[MakeCase]:
    """Kernels that multiply matrices."""
    grouped = HeadShape(num_heads=6, num_kv_heads=2, head_dim=24, page_tokens=4)
    single = HeadShape(num_heads=2, num_kv_heads=2, head_dim=16, page_tokens=16)
    yield partial(decode_case, grouped, (1, 0, 7, 33), dtype=dtype, device=device)
    yield partial(decode_case, single, (300, 1, 129, 64), dtype=dtype, device=device, max_context_tokens=300)
    yield partial(decode_case, single, (5,), dtype=dtype, device=device, max_context_tokens=4096)
    yield partial(prefill_case, grouped, ((0, 9), (5, 3), (30, 1)), dtype=dtype, device=device)
    yield partial(prefill_case, single, ((0, 70), (66, 33)), dtype=dtype, device=device)
    half = ExpertShape(num_experts=8, num_local=4, first_expert=2, num_choices=2, hidden=40, size=24)
    whole = ExpertShape(num_experts=5, num_local=5, first_expert=0, num_choices=3, hidden=32, size=16)
    for shape, tokens in ((half, 1), (half, 21), (whole, 1), (whole, 37)):
        yield partial(gated_case, tokens, shape, dtype=dtype, device=device)
        yield partial(down_case, tokens, shape, dtype=dtype, device=device)


def _tiny_row_cases(dtype: torch.dtype, device: torch.device) -> Iterator[MakeCase]:
    """Kernels that work row by row."""
    grouped = HeadShape(num_heads=6, num_kv_heads=2, head_dim=24, page_tokens=4)
    for multiplier in (None, 1.0, 0.22):
        yield partial(add_norm_case, 3, 48, multiplier=multiplier, dtype=dtype, device=device)
    yield partial(rope_case, 5, grouped, dtype=dtype, device=device)
    yield partial(swiglu_case, 3, 1030, dtype=dtype, device=device)
    yield partial(router_case, 5, 12, 3, dtype=dtype, device=device)
    yield partial(norm_linear_case, 37, 1030, dtype=dtype, device=device)
    yield partial(norm_gated_case, 37, 1030, dtype=dtype, device=device)
    yield partial(add_product_case, 37, 4110, dtype=dtype, device=device)
    odd = ExpertShape(num_experts=12, num_local=12, first_expert=0, num_choices=3, hidden=40, size=24)
    yield partial(token_router_case, odd, dtype=dtype, device=device)
    yield partial(token_experts_case, odd, dtype=dtype, device=device)


def served_cases(dtype: torch.dtype, device: torch.device) -> Iterator[MakeCase]:
    """Llama-3.2-1B, Llama-3.1-8B and granite-3.0-1b-a400m: decode at several batches, and a prompt chunk."""
    for heads in (LLAMA_8B, GRANITE):
        for batch, context in ((1, 1024), (1, 16384), (64, 1024), (256, 1024)):
            yield partial(decode_case, heads, (context,) * batch, dtype=dtype, device=device)
        yield partial(prefill_case, heads, ((0, 2048),), dtype=dtype, device=device)
        yield partial(prefill_case, heads, ((6144, 2048),), dtype=dtype, device=device)
    for tokens in (1, 256, 2048):
        yield partial(add_norm_case, tokens, 4096, multiplier=1.0, dtype=dtype, device=device)
        yield partial(rope_case, max(3, tokens), LLAMA_8B, dtype=dtype, device=device)
        yield partial(swiglu_case, tokens, 14336, dtype=dtype, device=device)
        yield partial(router_case, tokens, 32, 8, dtype=dtype, device=device)
        yield partial(lists_case, tokens, GRANITE_EXPERTS, device=device)
    for tokens in (1, 8, 64, 256, 2048):
        yield partial(gated_case, tokens, GRANITE_EXPERTS, dtype=dtype, device=device)
        yield partial(down_case, tokens, GRANITE_EXPERTS, dtype=dtype, device=device)
    for rows in (2, 64, 256):
        yield partial(best_token_case, rows, 128256, num_valid=128256, device=device)


def token_cases(dtype: torch.dtype, device: torch.device) -> Iterator[MakeCase]:
    """Every product of a decode step with one token: Llama-3.2-1B, Llama-3.1-8B, and Granite's."""
    for num_rows, hidden in ((3072, 2048), (128_256, 2048), (6144, 4096), (128_256, 4096), (2048, 1024)):
        yield partial(norm_linear_case, num_rows, hidden, dtype=dtype, device=device)
    for size, hidden in ((8192, 2048), (14_336, 4096)):
        yield partial(norm_gated_case, size, hidden, dtype=dtype, device=device)
    for hidden, size in ((2048, 2048), (2048, 8192), (4096, 4096), (4096, 14_336), (1024, 1024)):
        yield partial(add_product_case, hidden, size, dtype=dtype, device=device)
    yield partial(token_router_case, GRANITE_EXPERTS, dtype=dtype, device=device)
    yield partial(token_experts_case, GRANITE_EXPERTS, dtype=dtype, device=device)
