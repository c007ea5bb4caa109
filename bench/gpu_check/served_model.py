"""A served shape on the device: random weights, and a cache as large as its batches need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.gpu_check.bare_model import BareModel, DecodeLoop, make_bare_model
from bench.gpu_check.report import SectionReport
from bench.gpu_check.roofline import costs
from bench.gpu_check.setting import Setting
from bench.gpu_check.shapes import Shape, random_weights, served_shapes, small_shapes, spec_of
from replicas.config import ParallelConfig
from replicas.parallel.degrees import shard_of

_BATCHES: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
_QUICK_BATCHES: tuple[int, ...] = (1, 64, 256)
_TINY_BATCHES: tuple[int, ...] = (2,)
_SPARE_BYTES = 4 * 2**30
_PAGE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`batches` fit the cache, at contexts that begin with `context` tokens and grow by `steps`; a prompt has
    `chunk` tokens. `launched`, the same weights and cache, takes one token the way of many."""

    name: str
    model: BareModel
    launched: BareModel
    batches: tuple[int, ...]
    context: int
    steps: int
    chunk: int

    def loop(self, batch: int, *, is_fused: bool = True) -> DecodeLoop:
        model = self.model if is_fused else self.launched
        ids = torch.randperm(model.spec.vocab_size, device=model.device)[:batch]
        return DecodeLoop(model, ids, start_pos=self.context, max_tokens=self.steps)


def shapes_of(setting: Setting) -> list[Shape]:
    """The served shape the section is about, or all of them."""
    if setting.is_tiny:
        return small_shapes(is_tiny=True)[-1:]
    return [shape for shape in served_shapes() if setting.shape in ("", shape.name)]


def make_served_model(shape: Shape, setting: Setting, report: SectionReport) -> ServedModel:
    spec = spec_of(shape)
    shard = shard_of(spec, ParallelConfig(), 0)
    weights = random_weights(spec, shard, device=setting.device, dtype=setting.dtype)
    context, steps, chunk = (20, 2, 4) if setting.is_tiny else (960, 128, 2048)
    wanted = _TINY_BATCHES if setting.is_tiny else _QUICK_BATCHES if setting.is_quick else _BATCHES
    pages_each = -(-(context + steps) // _PAGE)
    block_bytes = costs(spec, setting.dtype.itemsize).kv_bytes_per_token * _PAGE
    most = (setting.free_bytes() - _SPARE_BYTES) // (block_bytes * pages_each)
    batches = tuple(one for one in wanted if setting.is_tiny or one <= most)
    if left := [one for one in wanted if one not in batches]:
        report.skip(f"{shape.name} at batch {left}: the cache does not fit beside the weights")
    blocks = 1 + max(max(batches, default=1) * pages_each, -(-chunk // _PAGE))
    model = make_bare_model(spec, shard, weights, num_blocks=blocks, block_tokens=_PAGE)
    for cache in (*model.kv.keys, *model.kv.values):
        cache.normal_()  # A cache of zeros would draw less power than a real one.
    return ServedModel(
        name=shape.name,
        model=model,
        launched=model.without_fusion(weights),
        batches=batches,
        context=context,
        steps=steps,
        chunk=chunk,
    )
