"""Everything that serves on a CPU imports, and knows what it lacks, where Triton is not installed."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None
import replicas.rank.runner, replicas.rank.model, replicas.layers.triton.sequences
import replicas.layers.triton.varlen
try:
    import replicas.layers.triton.layers
except ImportError:
    print("only the kernels need Triton")
"""


def test_a_rank_imports_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout == "only the kernels need Triton\n", done.stderr
