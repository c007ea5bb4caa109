"""Every kernel compiles for Hopper and fits its shared memory; no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton (pip install 'wattline[gpu]')")

KERNELS = {
    "_attend_part",
    "_merge_parts",
    "_attend_chunk",
    "_rotate_and_write",
    "_add_norm",
    "_swiglu",
    "_choose",
    "_list_pairs",
    "_gated",
    "_down",
    "_combine",
    "_best_of_tiles",
    "_best_of_rows",
    "_norm_linear",
    "_norm_gated",
    "_add_product",
    "_norm_router",
}


@pytest.mark.processes
def test_every_kernel_compiles_for_hopper() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check.compile_only"],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == KERNELS
