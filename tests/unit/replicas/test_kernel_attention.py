"""The compiled attention against float64: chunks and decode steps, every kind of head, every build."""

from __future__ import annotations

import ctypes
import platform
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from replicas.layers.kernels.build import build_library
from replicas.layers.kernels.library import CAttentionLayer, CStep, KernelPool

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

BUILDS = {"native": (), "avx2": ("-mno-avx512f", "-O1"), "generic": ("-mno-avx2", "-mno-avx512f", "-O1")}
HIDDEN = 16
BLOCK_TOKENS = 16
BLOCKS_PER_SEQUENCE = 20
EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens of one sequence in a step, after those that are cached."""

    num_cached: int
    num_tokens: int


STEP = (
    Chunk(num_cached=0, num_tokens=1),
    Chunk(num_cached=0, num_tokens=130),
    Chunk(num_cached=95, num_tokens=2),
    Chunk(num_cached=200, num_tokens=37),
    Chunk(num_cached=250, num_tokens=1),
)


@pytest.fixture(scope="module", params=BUILDS if platform.machine() == "x86_64" else ["native"])
def pool(request: pytest.FixtureRequest) -> KernelPool:
    return KernelPool(2, build_library(more_flags=BUILDS[request.param]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Random weights, tokens and cache of `STEP`; `places[i]` are the slots of sequence i, by position."""

    qkv: torch.Tensor
    out: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    x: torch.Tensor
    blocks: torch.Tensor
    places: tuple[torch.Tensor, ...]


STARTS = np.cumsum([0, *(chunk.num_tokens for chunk in STEP)])


def make_inputs(heads: Heads) -> Inputs:
    generator = torch.Generator().manual_seed(heads.head_dim)
    width = heads.num_heads * heads.head_dim
    num_blocks = len(STEP) * BLOCKS_PER_SEQUENCE
    shape = (2, num_blocks, BLOCK_TOKENS, heads.num_kv_heads, heads.head_dim)
    keys, values = torch.randn(shape, generator=generator).unbind()
    blocks = torch.randperm(num_blocks, generator=generator).view(len(STEP), -1)
    qkv_rows = width + 2 * heads.num_kv_heads * heads.head_dim
    return Inputs(
        qkv=torch.randn(qkv_rows, HIDDEN, generator=generator) / HIDDEN**0.5,
        out=torch.randn(HIDDEN, width, generator=generator) / heads.num_heads,
        keys=keys,
        values=values,
        x=torch.randn(int(STARTS[-1]), HIDDEN, generator=generator),
        blocks=blocks,
        places=tuple((row[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten() for row in blocks),
    )


def attend(pool: KernelPool, heads: Heads, inputs: Inputs) -> torch.Tensor:
    """What the kernel gives, [tokens, HIDDEN]; and the cache holds the step then. No rotation."""
    num_tokens = len(inputs.x)
    qkv, out, norm = pool.pack(inputs.qkv), pool.pack(inputs.out), torch.ones(HIDDEN)
    cos, sin = torch.ones(num_tokens, heads.head_dim), torch.zeros(num_tokens, heads.head_dim)
    rows = np.array([(STARTS[i], chunk.num_tokens, chunk.num_cached, i) for i, chunk in enumerate(STEP)])
    slots = torch.cat(
        [
            places[chunk.num_cached :][: chunk.num_tokens]
            for places, chunk in zip(inputs.places, STEP, strict=True)
        ]
    )
    layer = CAttentionLayer(
        norm_weight=norm.data_ptr(),
        qkv=qkv.layout,
        out=out.layout,
        keys=inputs.keys.data_ptr(),
        values=inputs.values.data_ptr(),
    )
    step = CStep(
        num_tokens=num_tokens,
        num_sequences=len(STEP),
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        block_tokens=BLOCK_TOKENS,
        table_stride=BLOCKS_PER_SEQUENCE,
        cosine=cos.data_ptr(),
        signed_sine=sin.data_ptr(),
        slots=slots.data_ptr(),
        sequences=rows.ctypes.data,
        tables=inputs.blocks.data_ptr(),
        eps=EPS,
        scale=heads.head_dim**-0.5,
    )
    y = torch.empty(num_tokens, HIDDEN)
    pool.library.wl_attention(
        pool.handle, ctypes.byref(layer), ctypes.byref(step), inputs.x.data_ptr(), y.data_ptr()
    )
    return y.double()


def attend_exactly(heads: Heads, inputs: Inputs) -> torch.Tensor:
    """The same in float64, over the cache that `attend` has written to."""
    x = inputs.x.double()
    normed = x / (x.square().mean(1, keepdim=True) + EPS).sqrt()
    q = (normed @ inputs.qkv.double().t())[:, : heads.num_heads * heads.head_dim]
    mixed = []
    for i, chunk in enumerate(STEP):
        length = chunk.num_cached + chunk.num_tokens
        of_sequence = q[STARTS[i] : STARTS[i + 1]].view(-1, heads.num_heads, heads.head_dim)
        k, v = (
            cache.flatten(0, 1)[inputs.places[i][:length]].double().transpose(0, 1)[None]
            for cache in (inputs.keys, inputs.values)
        )
        is_visible = torch.arange(length) <= torch.arange(chunk.num_cached, length)[:, None]
        heads_first = scaled_dot_product_attention(
            of_sequence.transpose(0, 1)[None], k, v, is_visible, enable_gqa=True
        )
        mixed.append(heads_first[0].transpose(0, 1).flatten(1))
    return torch.cat(mixed) @ inputs.out.double().t()


@pytest.mark.parametrize("head_dim", [64, 128, 20])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (3, 1), (2, 2)])
def test_attention_is_exact_to_rounding(
    pool: KernelPool, head_dim: int, num_heads: int, num_kv_heads: int
) -> None:
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    inputs = make_inputs(heads)
    ours = attend(pool, heads, inputs)
    torch.testing.assert_close(ours, attend_exactly(heads, inputs), rtol=1e-5, atol=1e-5)


def test_a_poisoned_token_spoils_its_own_sequence_alone(pool: KernelPool) -> None:
    heads = Heads(num_heads=4, num_kv_heads=2, head_dim=64)
    sound = attend(pool, heads, make_inputs(heads))
    inputs = make_inputs(heads)
    inputs.x[STARTS[1] + 64] = torch.nan
    poisoned = attend(pool, heads, inputs)
    assert poisoned[STARTS[1] + 64 : STARTS[2]].isnan().all()
    assert torch.equal(poisoned[: STARTS[1]], sound[: STARTS[1]])
    assert torch.equal(poisoned[STARTS[2] :], sound[STARTS[2] :])
