"""Section `rates`: what the device moves and multiplies at best, the yardstick of every fraction here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.gpu_check.case import draw
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes and floating-point operations per second, measured in this process."""

    read_b_s: float
    copy_b_s: float
    triad_b_s: float
    matmul_flop_s: float

    @property
    def best_b_s(self) -> float:
        """What the memory gave at most; which of the three it is depends on torch's kernels."""
        return max(self.read_b_s, self.copy_b_s, self.triad_b_s)


def run(setting: Setting, report: SectionReport) -> None:
    rates = measure_rates(setting)
    report.row(
        read_gb_per_s=rates.read_b_s / 1e9,
        copy_gb_per_s=rates.copy_b_s / 1e9,
        triad_gb_per_s=rates.triad_b_s / 1e9,
        matmul_tflop_per_s=rates.matmul_flop_s / 1e12,
        dtype=str(setting.dtype).removeprefix("torch."),
    )


def measure_rates(setting: Setting) -> Rates:
    """Arrays far larger than any cache; what is read and what is written both count."""
    moved = _measure_memory(setting)
    size = 128 if setting.is_tiny else 8192
    left, right = (draw((size, size), setting.dtype, setting.device, seed=seed) for seed in (1, 2))
    out = torch.empty_like(left)
    matmul_s = setting.time_s(lambda: torch.mm(left, right.t(), out=out), budget_s=0.5)
    read_b_s, copy_b_s, triad_b_s = moved
    return Rates(
        read_b_s=read_b_s,
        copy_b_s=copy_b_s,
        triad_b_s=triad_b_s,
        matmul_flop_s=2 * size**3 / matmul_s,
    )


def _measure_memory(setting: Setting) -> tuple[float, float, float]:
    """Bytes per second of a sum, of a = b, and of a = a + s * b."""
    count = 2**16 if setting.is_tiny else 2**29
    a, b = (torch.ones(count, device=setting.device, dtype=torch.float32) for _ in range(2))
    num_bytes = 4 * count
    return (
        num_bytes / setting.time_s(a.sum),
        2 * num_bytes / setting.time_s(lambda: a.copy_(b)),
        3 * num_bytes / setting.time_s(lambda: a.add_(b, alpha=1.0001)),
    )
