"""Section `kernels`: every kernel against its float64 reference, and the served shapes against the clock."""

from __future__ import annotations

import torch

from bench.gpu_check.case import KernelCase
from bench.gpu_check.cases import served_cases, tiny_cases
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting


def run(setting: Setting, report: SectionReport) -> None:
    for case in tiny_cases(setting.device):
        if not report.has_time():
            report.skip("more odd shapes: out of time")
            break
        error = case.error()
        report.check(error <= case.tolerance, case=case.name, error=error)
    if setting.is_tiny or not setting.is_cuda:
        report.skip("served shapes and times: they need a GPU")
        return
    for case in served_cases(torch.bfloat16, setting.device):
        if not report.has_time():
            report.skip("more served shapes: out of time")
            break
        _check_and_time(case, setting, report)


def _check_and_time(case: KernelCase, setting: Setting, report: SectionReport) -> None:
    error = case.error()
    time_s = setting.time_s(case.launch, budget_s=0.05 if setting.is_quick else 0.2)
    values: dict[str, object] = {"case": case.name, "error": error, "microseconds": time_s * 1e6}
    if case.num_bytes:
        values["gb_per_s"] = case.num_bytes / time_s / 1e9
    if case.num_flops:
        values["tflop_per_s"] = case.num_flops / time_s / 1e12
    report.check(error <= case.tolerance, **values)
