"""Section `graphs`: a captured decode step draws the tokens that the same step draws when it is launched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.gpu_check.bare_model import BareModel, DecodeLoop, make_bare_model
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting
from bench.gpu_check.shapes import random_weights, small_shapes, spec_of
from replicas.attention_choice import VARLEN_ALONE, VARLEN_PAGE_TOKENS
from replicas.config import EngineLimits, ParallelConfig
from replicas.parallel.degrees import shard_of
from replicas.rank.attention_probe import AttentionProbe, ProbedSteps
from replicas.rank.device_clock import DeviceClock

_START = 5


def run(setting: Setting, report: SectionReport) -> None:
    num_steps = 2 if setting.is_tiny else 24
    shapes = small_shapes(is_tiny=setting.is_tiny)
    for shape in shapes[-1:] if setting.is_tiny else shapes:
        spec = spec_of(shape)
        shard = shard_of(spec, ParallelConfig(), 0)
        weights = random_weights(spec, shard, device=setting.device, dtype=setting.dtype)
        for batch in (2,) if setting.is_tiny else (1, 7, 64):
            for page, compare in ((16, _compare), (VARLEN_PAGE_TOKENS, _compare_varlen)):
                blocks = 1 + batch * -(-(_START + num_steps) // page)
                model = make_bare_model(spec, shard, weights, num_blocks=blocks, block_tokens=page)
                what = f"{shape.name} at batch {batch}, pages of {page}"
                report.attempt(what, partial(compare, what, model, batch, num_steps, setting, report))
    if not setting.is_cuda:
        report.skip("capture: CUDA graphs need a GPU")


@torch.inference_mode()
def _compare_varlen(
    what: str, model: BareModel, batch: int, num_steps: int, setting: Setting, report: SectionReport
) -> None:
    """With torch's varlen attention, where it passes a replica's own trial."""
    pages = model.layers.pages
    steps = ProbedSteps(limits=EngineLimits(), num_heads=model.shard.num_heads, context_tokens=_START)
    refusal = AttentionProbe(pages, model.kv, steps, DeviceClock(has_graphs=False)).refusal()
    if refusal:
        report.skip(f"{what}, varlen attention: {refusal}")
        return
    pages.choice = VARLEN_ALONE
    _compare(f"{what}, varlen attention", model, batch, num_steps, setting, report)


def _compare(
    what: str, model: BareModel, batch: int, num_steps: int, setting: Setting, report: SectionReport
) -> None:
    ids = torch.arange(3, 3 + batch, device=setting.device)
    loop = DecodeLoop(model, ids, start_pos=_START, max_tokens=num_steps)
    eager = _tokens(loop, loop.step, num_steps)
    if not setting.is_cuda:
        report.check(len(set(eager)) > 1, case=what, path="launched alone")
        return
    captured = _tokens(loop, loop.captured(), num_steps)
    report.check(eager == captured, case=what, steps=num_steps)


def _tokens(loop: DecodeLoop, step: Callable[[], object], num_steps: int) -> list[tuple[int, ...]]:
    loop.reset()
    drawn = []
    for _ in range(num_steps):
        step()
        drawn.append(tuple(loop.token_ids.tolist()))
    return drawn
