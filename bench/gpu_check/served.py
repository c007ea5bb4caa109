"""Section `served`: the served shapes run at every batch size, and their logits are finite.

Beside the other checks, so that whatever is measured later finds its kernels compiled.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu_check.bare_model import chunk_batch
from bench.gpu_check.report import SectionReport
from bench.gpu_check.served_model import ServedModel, make_served_model, shapes_of
from bench.gpu_check.setting import Setting
from bench.gpu_check.shapes import Shape


def run(setting: Setting, report: SectionReport) -> None:
    for shape in shapes_of(setting):
        report.attempt(shape.name, partial(_check_shape, shape, setting, report))


@torch.inference_mode()
def _check_shape(shape: Shape, setting: Setting, report: SectionReport) -> None:
    served = make_served_model(shape, setting, report)
    ids = torch.randint(0, served.model.spec.vocab_size, (served.chunk,), device=setting.device)
    logits_SV, _ = served.model.decoder.logits(chunk_batch(served.model, ids, first_block=1))
    _check_finite(served, logits_SV, report, phase="prefill", tokens=served.chunk)
    for batch in served.batches:
        for is_fused in (True, False) if batch == 1 else (True,):
            loop = served.loop(batch, is_fused=is_fused)
            loop.step()
            _check_finite(served, loop.logits(), report, phase="decode", batch=batch, is_fused=is_fused)


def _check_finite(
    served: ServedModel, logits_SV: torch.Tensor, report: SectionReport, **values: object
) -> None:
    valid_SV = logits_SV[:, : served.model.shard.vocab_valid]
    report.check(bool(valid_SV.isfinite().all()), model=served.name, **values)
