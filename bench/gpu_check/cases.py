"""The catalogue of kernel cases: tiny ones for right and wrong, and those of served shapes for speed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.gpu_check.attention_cases import HeadShape, decode_case, prefill_case
from bench.gpu_check.case import KernelCase
from bench.gpu_check.expert_cases import ExpertShape, down_case, gated_case, lists_case, router_case
from bench.gpu_check.layer_cases import add_norm_case, best_token_case, rope_case, swiglu_case

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LLAMA_8B = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128, page_tokens=16)
LLAMA_1B = HeadShape(num_heads=32, num_kv_heads=8, head_dim=64, page_tokens=16)
GRANITE = HeadShape(num_heads=16, num_kv_heads=8, head_dim=64, page_tokens=16)
GRANITE_EXPERTS = ExpertShape(
    num_experts=32, num_local=32, first_expert=0, num_choices=8, hidden=1024, size=512
)


def tiny_cases(device: torch.device) -> Iterator[KernelCase]:
    """Odd sizes, tails, empty sequences and foreign experts; seconds in the interpreter.

    The interpreter multiplies no bfloat16 matrices: float16 stands for half precision in those kernels there.
    """
    is_interpreted = device.type != "cuda"
    for dtype in (torch.float32, torch.float16) if is_interpreted else _DTYPES:
        yield from _tiny_product_cases(dtype, device)
    for dtype in _DTYPES:
        yield from _tiny_row_cases(dtype, device)
    half = ExpertShape(num_experts=8, num_local=4, first_expert=2, num_choices=2, hidden=40, size=24)
    yield lists_case(1, half, device=device)
    yield lists_case(21, half, device=device)
    yield best_token_case(3, 4160, num_valid=4133, device=device)


def _tiny_product_cases(dtype: torch.dtype, device: torch.device) -> Iterator[KernelCase]:
    """Kernels that multiply matrices."""
    grouped = HeadShape(num_heads=6, num_kv_heads=2, head_dim=24, page_tokens=4)
    single = HeadShape(num_heads=2, num_kv_heads=2, head_dim=16, page_tokens=16)
    yield decode_case(grouped, (1, 0, 7, 33), dtype=dtype, device=device)
    yield decode_case(single, (300, 1, 129, 64), dtype=dtype, device=device, max_context_tokens=300)
    yield decode_case(single, (5,), dtype=dtype, device=device, max_context_tokens=4096)
    yield prefill_case(grouped, ((0, 9), (5, 3), (30, 1)), dtype=dtype, device=device)
    yield prefill_case(single, ((0, 70), (66, 33)), dtype=dtype, device=device)
    half = ExpertShape(num_experts=8, num_local=4, first_expert=2, num_choices=2, hidden=40, size=24)
    whole = ExpertShape(num_experts=5, num_local=5, first_expert=0, num_choices=3, hidden=32, size=16)
    for shape, tokens in ((half, 1), (half, 21), (whole, 37)):
        yield gated_case(tokens, shape, dtype=dtype, device=device)
        yield down_case(tokens, shape, dtype=dtype, device=device)


def _tiny_row_cases(dtype: torch.dtype, device: torch.device) -> Iterator[KernelCase]:
    """Kernels that work row by row."""
    grouped = HeadShape(num_heads=6, num_kv_heads=2, head_dim=24, page_tokens=4)
    for multiplier in (None, 1.0, 0.22):
        yield add_norm_case(3, 48, multiplier=multiplier, dtype=dtype, device=device)
    yield rope_case(5, grouped, dtype=dtype, device=device)
    yield swiglu_case(3, 1030, dtype=dtype, device=device)
    yield router_case(5, 12, 3, dtype=dtype, device=device)


def served_cases(dtype: torch.dtype, device: torch.device) -> Iterator[KernelCase]:
    """Llama-3.2-1B, Llama-3.1-8B and granite-3.0-1b-a400m: decode at several batches, and a prompt chunk."""
    for heads in (LLAMA_8B, GRANITE):
        for batch, context in ((1, 1024), (1, 16384), (64, 1024), (256, 1024)):
            yield decode_case(heads, (context,) * batch, dtype=dtype, device=device)
        yield prefill_case(heads, ((0, 2048),), dtype=dtype, device=device)
        yield prefill_case(heads, ((6144, 2048),), dtype=dtype, device=device)
    for tokens in (1, 256, 2048):
        yield add_norm_case(tokens, 4096, multiplier=1.0, dtype=dtype, device=device)
        yield rope_case(max(3, tokens), LLAMA_8B, dtype=dtype, device=device)
        yield swiglu_case(tokens, 14336, dtype=dtype, device=device)
        yield router_case(tokens, 32, 8, dtype=dtype, device=device)
        yield lists_case(tokens, GRANITE_EXPERTS, device=device)
    for tokens in (1, 8, 64, 256, 2048):
        yield gated_case(tokens, GRANITE_EXPERTS, dtype=dtype, device=device)
        yield down_case(tokens, GRANITE_EXPERTS, dtype=dtype, device=device)
    for rows in (2, 64, 256):
        yield best_token_case(rows, 128256, num_valid=128256, device=device)
