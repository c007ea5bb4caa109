"""Section `graphs`: a captured decode step draws the tokens that the same step draws when it is launched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.gpu_check.bare_model import DecodeLoop, make_bare_model
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting
from bench.gpu_check.shapes import random_weights, small_shapes, spec_of
from replicas.config import ParallelConfig
from replicas.parallel.degrees import shard_of

_START = 5


def run(setting: Setting, report: SectionReport) -> None:
    num_steps = 2 if setting.is_tiny else 24
    shapes = small_shapes(is_tiny=setting.is_tiny)
    for shape in shapes[-1:] if setting.is_tiny else shapes:
        spec = spec_of(shape)
        shard = shard_of(spec, ParallelConfig(), 0)
        weights = random_weights(spec, shard, device=setting.device, dtype=setting.dtype)
        for batch in (2,) if setting.is_tiny else (1, 7, 64):
            blocks = 1 + batch * -(-(_START + num_steps) // 16)
            model = make_bare_model(spec, shard, weights, num_blocks=blocks, block_tokens=16)
            ids = torch.arange(3, 3 + batch, device=setting.device)
            loop = DecodeLoop(model, ids, start_pos=_START, max_tokens=num_steps)
            what = f"{shape.name} at batch {batch}"
            report.attempt(what, partial(_compare, shape.name, loop, batch, num_steps, setting, report))
    if not setting.is_cuda:
        report.skip("capture: CUDA graphs need a GPU")


def _compare(
    name: str, loop: DecodeLoop, batch: int, num_steps: int, setting: Setting, report: SectionReport
) -> None:
    eager = _tokens(loop, loop.step, num_steps)
    if not setting.is_cuda:
        report.check(len(set(eager)) > 1, model=name, batch=batch, path="launched alone")
        return
    captured = _tokens(loop, loop.captured(), num_steps)
    report.check(eager == captured, model=name, batch=batch, steps=num_steps)


def _tokens(loop: DecodeLoop, step: Callable[[], object], num_steps: int) -> list[tuple[int, ...]]:
    loop.reset()
    drawn = []
    for _ in range(num_steps):
        step()
        drawn.append(tuple(loop.token_ids.tolist()))
    return drawn
