"""Every device kernel against its float64 reference on odd shapes: tails, empty rows, foreign experts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install 'wattline[gpu]')")

from bench.gpu_check.case import KernelCase
from bench.gpu_check.cases import tiny_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [make() for make in tiny_cases(DEVICE)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_is_exact_to_a_few_roundings(case: KernelCase) -> None:
    assert case.error() <= case.tolerance
