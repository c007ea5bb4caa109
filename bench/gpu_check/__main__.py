"""`python -m bench.gpu_check`: check and measure one GPU in at most eight minutes, without Ray or network.

Every section runs in a process of its own on a GPU: a kernel that hangs or breaks the device costs that
section alone, and what it had found is kept. Exit status: 0 all checks hold, 1 one does not or a section
broke off, 2 there is nothing to run on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu_check.report import Row, SectionReport
from bench.gpu_check.sections import SECTIONS, Section, section_named

if TYPE_CHECKING:  # Imports torch, which --help should not wait for.
    from bench.gpu_check.setting import Setting

_TOTAL_S = 480.0
_GRACE_S = 10.0
"""A section process that is this much over its budget is killed."""

EPILOG = """sections: {sections}

examples:
  make gpu-check                                         everything, about eight minutes
  make gpu-check ARGS="--quick"                          fewer batches, shorter windows
  python -m bench.gpu_check --only kernels --only meter  two sections
  python -m bench.gpu_check --device cpu --tiny          no GPU: tiny shapes in Triton's interpreter

Fractions of the roofline are of the bandwidth and matmul rate measured in the same run. Joules are those of
the NVML counter between two of its edges; static is what the idle GPU would have drawn in that time.
"""


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.device == "cpu":
        # Read when a kernel file is imported, which no module above does.
        os.environ["TRITON_INTERPRET"] = "1"
    missing = _what_is_missing(options.device)
    if missing:
        print(f"gpu-check: {missing}", file=sys.stderr)
        return 2
    if options.section_file is not None:
        return _run_here(section_named(options.only[0]), options, options.section_file)
    return _run_all(options, arguments if arguments is not None else sys.argv[1:])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [section.name for section in SECTIONS]
    described = "".join(f"\n  {one.name:<10} {one.answers}" for one in SECTIONS)
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description="Check numerics, kernels, graphs and meter of one GPU, then measure speed and joules.",
        epilog=EPILOG.format(sections=described),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer batches and shorter windows")
    parser.add_argument("--only", action="append", choices=names, help="run this section; may be repeated")
    parser.add_argument("--json", type=Path, help="result file; default bench/results/gpu-<name>-<date>.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes of seconds; what --device cpu needs")
    parser.add_argument("--section-file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the interpreter would take days for the served shapes")
    options.only = options.only or names
    return options


def _what_is_missing(device: str) -> str:
    """Why nothing can run, in one line; empty if it can."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if device == "cuda" and not torch.cuda.is_available():
        return (
            f"no CUDA device here (torch {torch.__version__}); run it on a machine with an NVIDIA GPU, or "
            "`python -m bench.gpu_check --device cpu --tiny` to see the check itself work"
        )
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed; torch's CUDA builds bring it, or pip install 'wattline[gpu]'"
    return ""


def _run_all(options: argparse.Namespace, arguments: list[str]) -> int:
    from bench.gpu_check.outcome import make_outcome

    began_s = time.monotonic()
    outcome = make_outcome(_setting(options), options.json, arguments)
    run = _run_apart if options.device == "cuda" else _run_beside
    with tempfile.TemporaryDirectory(prefix="wattline-gpu-check-") as folder:
        for section in SECTIONS:
            if section.name not in options.only:
                continue
            left_s = _TOTAL_S - (time.monotonic() - began_s)
            print(f"\n{section.name}: {section.answers}", flush=True)
            outcome.add(run(section, options, Path(folder) / f"{section.name}.json", left_s))
    print(f"\n{outcome.table()}\n\n{outcome.path}", flush=True)
    return 0 if outcome.is_right else 1


def _run_apart(section: Section, options: argparse.Namespace, path: Path, left_s: float) -> Row:
    """In a process of its own, killed when it is far over its budget."""
    if left_s < _GRACE_S:
        return _broken(section, path, "not run: the eight minutes are over")
    command = [sys.executable, "-m", "bench.gpu_check", "--only", section.name, "--section-file", str(path)]
    command += ["--quick"] * options.quick + ["--tiny"] * options.tiny
    try:
        done = subprocess.run(command, timeout=min(left_s, section.budget_s + _GRACE_S), check=False)
    except subprocess.TimeoutExpired as error:
        return _broken(section, path, f"killed after {error.timeout:.0f} s")
    if not path.exists() or done.returncode not in (0, 1):
        return _broken(section, path, f"its process ended with status {done.returncode}")
    return _read(path)


def _run_beside(section: Section, options: argparse.Namespace, path: Path, _left_s: float) -> Row:
    _run_here(section, options, path)
    return _read(path)


def _run_here(section: Section, options: argparse.Namespace, path: Path) -> int:
    report = SectionReport(name=section.name, path=path, budget_s=section.budget_s)
    report.save()
    try:
        section.load()(_setting(options), report)
    except Exception as error:  # A section that breaks must not take the others along; it is recorded.
        traceback.print_exc()
        report.error = f"{type(error).__name__}: {error}"
    report.save()
    return 1 if report.failed or report.error else 0


def _setting(options: argparse.Namespace) -> Setting:
    import torch

    from bench.gpu_check.setting import Setting

    return Setting(device=torch.device(options.device), is_tiny=options.tiny, is_quick=options.quick)


def _broken(section: Section, path: Path, error: str) -> Row:
    """What the section had saved, with why it ended."""
    row = _read(path) if path.exists() else {"section": section.name, "seconds": 0, "failed": 0}
    return {"skipped": [], "rows": []} | row | {"error": error}


def _read(path: Path) -> Row:
    row: Row = json.loads(path.read_text())
    return row


if __name__ == "__main__":
    sys.exit(main())
