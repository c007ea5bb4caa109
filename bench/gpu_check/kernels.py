"""Section `kernels`: every kernel against its float64 reference, on odd shapes and on served ones."""

from __future__ import annotations

import itertools
from functools import partial

import torch

from bench.gpu_check.cases import MakeCase, served_cases, tiny_cases, token_cases
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting


def run(setting: Setting, report: SectionReport) -> None:
    is_whole = setting.is_cuda and not setting.is_tiny
    cases = [tiny_cases(setting.device)]
    if is_whole:
        cases += [token_cases(torch.bfloat16, setting.device), served_cases(torch.bfloat16, setting.device)]
    for make in itertools.chain.from_iterable(cases):
        if not report.has_time():
            report.skip("more cases: out of time")
            break
        report.attempt(name_of(make), partial(_check, make, report))
    if not is_whole:
        report.skip("served shapes: they need a GPU")


def name_of(make: MakeCase) -> str:
    """Of a case that is not made yet."""
    function, arguments = getattr(make, "func", make), getattr(make, "args", ())
    return " ".join((function.__name__, *map(str, arguments)))


def _check(make: MakeCase, report: SectionReport) -> None:
    case = make()
    error = case.error()
    report.check(error <= case.tolerance, case=case.name, error=error)
