"""Section `times`: kernels and products of the served shapes against the clock, the device alone.

What is right and wrong is asked in `kernels`. The most telling first: products and kernels for one token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu_check.cases import MakeCase, served_cases, token_cases
from bench.gpu_check.kernels import name_of
from bench.gpu_check.product_cases import product_cases
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting


def run(setting: Setting, report: SectionReport) -> None:
    if not setting.is_cuda or setting.is_tiny:
        report.skip("times of served shapes: they need a GPU")
        return
    places = (torch.bfloat16, setting.device)
    cases: tuple[Iterator[MakeCase], ...] = (
        token_cases(*places),
        product_cases(*places),
        served_cases(*places),
    )
    for make in itertools.chain.from_iterable(cases):
        if not report.has_time(1.0):
            report.skip("more cases: out of time")
            break
        report.attempt(name_of(make), partial(_time, make, setting, report))


def _time(make: MakeCase, setting: Setting, report: SectionReport) -> None:
    case = make()
    time_s = setting.time_s(case.launch, budget_s=0.05)
    values: dict[str, object] = {"case": case.name, "microseconds": time_s * 1e6}
    if case.num_bytes:
        values["gb_per_s"] = case.num_bytes / time_s / 1e9
    if case.num_flops:
        values["tflop_per_s"] = case.num_flops / time_s / 1e12
    report.row(**values)
