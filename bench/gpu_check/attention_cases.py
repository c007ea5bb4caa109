"""Cases of the two attention kernels: lengths of every kind, shuffled pages, NaN where nobody owns a page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.gpu_check.case import KernelCase, draw
from replicas.layers.triton.decode_attention import decode_attention
from replicas.layers.triton.prefill_attention import prefill_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Query heads, KV heads, head_dim, and tokens of a page."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}, pages of {self.page_tokens}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pages:
    """A cache in which every sequence owns pages in no order, and all others hold NaN."""

    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor


def decode_case(
    shape: HeadShape,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_context_tokens: int = 0,
) -> KernelCase:
    """One query per sequence; length 0 must give zeros. `max_context_tokens` decides the splits."""
    pages = _make_pages(shape, lengths, dtype, device)
    q = draw((len(lengths), shape.num_heads, shape.head_dim), dtype, device, seed=1)
    scale = shape.head_dim**-0.5
    bound = max_context_tokens or max(lengths)

    def run() -> tuple[torch.Tensor]:
        out = torch.empty_like(q)
        decode_attention(
            q,
            pages.keys,
            pages.values,
            pages.tables,
            pages.lengths,
            out,
            scale=scale,
            max_context_tokens=bound,
        )
        return (out,)

    def reference() -> tuple[torch.Tensor]:
        outs = [
            _exact(q[row : row + 1], pages, shape, row, length, scale) for row, length in enumerate(lengths)
        ]
        return (torch.cat(outs),)

    cached = sum(lengths)
    return KernelCase(
        kernel="decode attention",
        shape=f"{len(lengths)} x {max(lengths)} of {bound}, {shape}",
        dtype=dtype,
        launch=run,
        results=run,
        reference=reference,
        num_bytes=2 * cached * shape.num_kv_heads * shape.head_dim * dtype.itemsize,
        num_flops=4 * cached * shape.num_heads * shape.head_dim,
    )


def prefill_case(
    shape: HeadShape, chunks: Sequence[tuple[int, int]], *, dtype: torch.dtype, device: torch.device
) -> KernelCase:
    """`chunks`: (tokens before, tokens of the chunk); a decode token comes first and must be left alone."""
    lengths = [before + tokens for before, tokens in chunks]
    pages = _make_pages(shape, lengths, dtype, device)
    starts = [1]
    for _, tokens in chunks:
        starts.append(starts[-1] + tokens)
    starts_C1 = torch.tensor(starts, dtype=torch.int32, device=device)
    q = draw((starts[-1], shape.num_heads, shape.head_dim), dtype, device, seed=2)
    scale = shape.head_dim**-0.5

    def run() -> tuple[torch.Tensor]:
        out = torch.full_like(q, 7.0)
        prefill_attention(
            q,
            pages.keys,
            pages.values,
            pages.tables,
            pages.lengths,
            starts_C1,
            out,
            scale=scale,
            max_chunk_tokens=max(tokens for _, tokens in chunks),
        )
        return (out,)

    def reference() -> tuple[torch.Tensor]:
        outs = [torch.full_like(q[:1], 7.0, dtype=torch.float64)]
        for row, (start, end) in enumerate(itertools.pairwise(starts)):
            outs.append(_exact(q[start:end], pages, shape, row, lengths[row], scale))
        return (torch.cat(outs),)

    pairs = sum(tokens * before + tokens * (tokens + 1) // 2 for before, tokens in chunks)
    return KernelCase(
        kernel="prefill attention",
        shape=f"{' '.join(f'{before}+{tokens}' for before, tokens in chunks)}, {shape}",
        dtype=dtype,
        launch=run,
        results=run,
        reference=reference,
        num_flops=4 * pairs * shape.num_heads * shape.head_dim,
    )


def _make_pages(shape: HeadShape, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> _Pages:
    counts = [-(-length // shape.page_tokens) for length in lengths]
    num_pages = sum(counts) + 2
    order = torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(3)) + 1
    tables = torch.zeros((len(lengths), max(1, *counts)), dtype=torch.int32)
    at = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[at : at + count]
        at += count
    size = (num_pages, shape.page_tokens, shape.num_kv_heads, shape.head_dim)
    keys, values = draw(size, dtype, device, seed=4), draw(size, dtype, device, seed=5)
    owned = torch.zeros(num_pages * shape.page_tokens, dtype=torch.bool)
    for row, length in enumerate(lengths):
        token = torch.arange(length)
        owned[tables[row, token // shape.page_tokens] * shape.page_tokens + token % shape.page_tokens] = True
    nobody = (~owned).to(device).view(size[:2])
    keys[nobody], values[nobody] = torch.nan, torch.nan
    return _Pages(
        keys=keys,
        values=values,
        tables=tables.to(device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def _exact(
    q: torch.Tensor, pages: _Pages, shape: HeadShape, row: int, length: int, scale: float
) -> torch.Tensor:
    """Attention of the last tokens of one sequence in float64: the plain formula."""
    if length == 0:
        return torch.zeros_like(q, dtype=torch.float64)
    table = pages.tables[row].long()
    keys, values = (
        cache[table].flatten(0, 1)[:length].double().repeat_interleave(q.shape[1] // shape.num_kv_heads, 1)
        for cache in (pages.keys, pages.values)
    )
    scores = torch.einsum("tnd,lnd->tnl", q.double(), keys) * scale
    position = torch.arange(length - len(q), length, device=q.device)
    is_later = torch.arange(length, device=q.device)[None, None, :] > position[:, None, None]
    weights = scores.masked_fill(is_later, -torch.inf).softmax(dim=-1)
    return torch.einsum("tnl,lnd->tnd", weights, values)
