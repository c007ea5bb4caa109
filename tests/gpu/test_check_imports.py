"""The GPU check imports where there are torch, Triton, transformers, safetensors and numpy, and no more."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton (pip install 'wattline[gpu]')")

SCRIPT = """
import sys
for absent in ("ray", "grpc", "google.protobuf", "pydantic", "psutil", "typer", "rich", "opentelemetry",
               "prometheus_client", "pynvml", "starlette", "uvicorn"):
    sys.modules[absent] = None
import bench.gpu_check.__main__, bench.gpu_check.outcome
from bench.gpu_check.sections import SECTIONS
for section in SECTIONS:
    section.load()
print("imported")
"""


@pytest.mark.processes
def test_the_check_needs_few_packages() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr
