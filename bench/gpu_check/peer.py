"""Section `peer`: transformers' own `generate` and forward on the same shapes, dtype and device.

Decode is the difference between a long and a short `generate`, so that prefill and set-up drop out.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers import PreTrainedModel

from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting
from bench.gpu_check.shapes import Shape, served_shapes, small_shapes

_BATCHES = {"Llama-3.2-1B": (1, 32), "Llama-3.1-8B": (1,), "granite-3.0-1b-a400m": (1, 32)}


def run(setting: Setting, report: SectionReport) -> None:
    for shape in small_shapes(is_tiny=True) if setting.is_tiny else served_shapes():
        if not report.has_time(10.0 if setting.is_cuda else 0.0):
            report.skip(f"{shape.name}: out of time")
            continue
        report.attempt(shape.name, partial(_measure, shape, setting, report))


def _measure(shape: Shape, setting: Setting, report: SectionReport) -> None:
    model = _make(shape, setting)
    _measure_prefill(shape, model, setting, report)
    for batch in _BATCHES.get(shape.name, (2,)):
        if not report.has_time(8.0 if setting.is_cuda else 0.0):
            report.skip(f"{shape.name} at batch {batch}: out of time")
            continue
        _measure_decode(shape, model, batch, setting, report)


def _make(shape: Shape, setting: Setting) -> PreTrainedModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device(setting.device):
            return shape.model(shape.config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def _measure_decode(
    shape: Shape, model: PreTrainedModel, batch: int, setting: Setting, report: SectionReport
) -> None:
    prompt, short, long = (8, 1, 3) if setting.is_tiny else (1024, 1, 33)
    ids = torch.randint(3, shape.config.vocab_size, (batch, prompt), device=setting.device)
    times_s = [
        setting.host_time_s(partial(_generate, model, ids, count), repeats=2) for count in (short, long)
    ]
    seconds = times_s[1] - times_s[0]
    if seconds <= 0:
        report.skip(f"{shape.name} at batch {batch}: {long} tokens took no longer than {short}")
        return
    report.row(
        model=shape.name,
        phase="decode",
        path="transformers generate",
        batch=batch,
        tok_per_s=batch * (long - short) / seconds,
        ms_per_step=1e3 * seconds / (long - short),
    )


def _generate(model: PreTrainedModel, ids: torch.Tensor, count: int) -> None:
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )


@torch.inference_mode()
def _measure_prefill(shape: Shape, model: PreTrainedModel, setting: Setting, report: SectionReport) -> None:
    num_tokens = 8 if setting.is_tiny else 2048
    ids = torch.randint(3, shape.config.vocab_size, (1, num_tokens), device=setting.device)
    seconds = setting.host_time_s(lambda: model(ids, logits_to_keep=1, use_cache=True))
    report.row(
        model=shape.name,
        phase="prefill",
        path="transformers forward",
        tokens=num_tokens,
        tok_per_s=num_tokens / seconds,
    )
