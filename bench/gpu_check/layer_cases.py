"""Cases of the row-wise kernels: residual and norm, rotation and cache write, gate, draw of a token."""

from __future__ import annotations

import torch
from torch.nn import functional

from bench.gpu_check.attention_cases import HeadShape
from bench.gpu_check.case import KernelCase, Tensors, draw, size_bytes
from replicas.layers.rope import rotation_at
from replicas.layers.triton.add_norm import add_norm
from replicas.layers.triton.rope_cache import rope_to_cache
from replicas.layers.triton.sample import best_tokens
from replicas.layers.triton.swiglu import swiglu

_EPS = 1e-5


def add_norm_case(
    tokens: int, hidden: int, *, multiplier: float | None, dtype: torch.dtype, device: torch.device
) -> KernelCase:
    """`multiplier` None: the first norm of a model, with nothing to add."""
    x, delta = draw((tokens, hidden), dtype, device, seed=1), draw((tokens, hidden), dtype, device, seed=2)
    weight = draw((hidden,), dtype, device, seed=3)

    def run(x: torch.Tensor) -> Tensors:
        added = None if multiplier is None else delta
        return add_norm(x, added, weight, multiplier=multiplier or 1.0, eps=_EPS), x

    def reference() -> Tensors:
        added = x if multiplier is None else (x.float() + multiplier * delta.float()).to(dtype)
        wide = added.double()
        inverse = (wide.square().mean(1, keepdim=True) + _EPS).rsqrt()
        return wide * inverse * weight.double(), wide

    scratch = x.clone()
    return KernelCase(
        kernel="residual + norm",
        shape=f"{tokens} x {hidden}, multiplier {multiplier}",
        dtype=dtype,
        launch=lambda: run(scratch),
        results=lambda: run(x.clone()),
        reference=reference,
        num_bytes=size_bytes(x) * (2 if multiplier is None else 4),
    )


def rope_case(tokens: int, shape: HeadShape, *, dtype: torch.dtype, device: torch.device) -> KernelCase:
    """Tokens go to slots in no order; the two last are padding and share slot 0."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    qkv = draw((tokens, (heads + 2 * kv_heads) * head_dim), dtype, device, seed=1)
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, head_dim, 2, device=device) / head_dim)
    rotation = rotation_at(torch.arange(tokens, device=device) * 3, frequencies, dtype)
    blocks = -(-tokens // shape.page_tokens) + 1
    size = (blocks, shape.page_tokens, kv_heads, head_dim)
    order = torch.randperm((blocks - 1) * shape.page_tokens, generator=torch.Generator().manual_seed(1))
    slots = order[:tokens] + shape.page_tokens
    slots[-2:] = 0
    slots = slots.to(device)
    caches = torch.zeros(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device)

    def run(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return rope_to_cache(qkv, rotation, slots, keys, values, num_heads=heads)

    def results() -> Tensors:
        keys, values = (cache.clone() for cache in caches)
        q = run(keys, values)
        return q, keys[1:], values[1:]

    def reference() -> Tensors:
        wide = qkv.double().view(tokens, heads + 2 * kv_heads, head_dim)
        left, right = wide.chunk(2, dim=2)
        turned = wide * rotation.cos_T1D.double()
        turned += torch.cat((right, left), dim=2) * rotation.signed_sin_T1D.double()
        keys, values = (cache.double().flatten(0, 1) for cache in caches)
        keys[slots], values[slots] = turned[:, heads : heads + kv_heads], wide[:, heads + kv_heads :]
        return turned[:, :heads], keys.view(size)[1:], values.view(size)[1:]

    return KernelCase(
        kernel="rope + KV write",
        shape=f"{tokens} tokens, {shape}",
        dtype=dtype,
        launch=lambda: run(*caches),
        results=results,
        reference=reference,
        num_bytes=2 * size_bytes(qkv),
    )


def swiglu_case(tokens: int, size: int, *, dtype: torch.dtype, device: torch.device) -> KernelCase:
    gate_up = draw((tokens, 2 * size), dtype, device, seed=1, scale=2.0)

    def reference() -> Tensors:
        gate, up = gate_up.double().chunk(2, dim=1)
        return (functional.silu(gate) * up,)

    return KernelCase(
        kernel="swiglu",
        shape=f"{tokens} x {size}",
        dtype=dtype,
        launch=lambda: swiglu(gate_up),
        results=lambda: (swiglu(gate_up),),
        reference=reference,
        num_bytes=size_bytes(gate_up) * 3 // 2,
    )


def best_token_case(rows: int, vocab: int, *, num_valid: int, device: torch.device) -> KernelCase:
    """Greedy rows; ties in row 0 go to the lowest id, and row 1 is broken."""
    logits = draw((rows, vocab), torch.float32, device, seed=1)
    logits[:, num_valid:] = 99.0
    logits[0, 3::7] = 50.0
    logits[1, num_valid // 2] = torch.nan
    keys = torch.zeros((rows, 2), dtype=torch.int32, device=device)
    cold = torch.zeros(rows, device=device)

    def run() -> Tensors:
        score, index = best_tokens(logits, num_valid=num_valid, first_id=0, keys_S2=keys, temperatures_S=cold)
        is_broken = score.isnan()
        return index.masked_fill(is_broken, -1).long(), score.nan_to_num(nan=0.0)

    def reference() -> Tensors:
        valid = logits[:, :num_valid].double()
        is_broken = ~valid.sum(1).isfinite()
        best = valid.nan_to_num(nan=-1e9).amax(1)
        first = (valid == best[:, None]).int().argmax(1)
        return first.masked_fill(is_broken, -1), best.masked_fill(is_broken, 0.0)

    return KernelCase(
        kernel="best token",
        shape=f"{rows} x {vocab}",
        dtype=torch.float32,
        launch=lambda: best_tokens(
            logits, num_valid=num_valid, first_id=0, keys_S2=keys, temperatures_S=cold
        ),
        results=run,
        reference=reference,
        num_bytes=size_bytes(logits),
    )
