"""`python -m bench.gpu_check`: check and measure one GPU in at most eight minutes, without Ray or network.

Every section runs in a process of its own on a GPU (`apart.py`), and what it had found is kept whatever
happens. Exit status: 0 all checks hold, 1 one does not or a section broke off, 2 there is nothing to run on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu_check.apart import BROKEN_STATUS, Apart
from bench.gpu_check.report import Row, SectionReport
from bench.gpu_check.sections import SECTIONS, Section, section_named

if TYPE_CHECKING:  # Imports torch, which --help should not wait for.
    from bench.gpu_check.setting import Setting

_TOTAL_S = 475.0

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
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
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

    end_s = time.monotonic() + _TOTAL_S
    outcome = make_outcome(_setting(options), options.json, arguments)
    with tempfile.TemporaryDirectory(prefix="wattline-gpu-check-") as name:
        folder = Path(name)
        passed_on = ["--quick"] * options.quick + ["--tiny"] * options.tiny
        apart = Apart(folder=folder, options=passed_on, end_s=end_s)
        for sections in _together(options.only):
            for section in sections:
                print(f"\n{section.name}: {section.answers}", flush=True)
            rows = apart.run(sections) if options.device == "cuda" else _run_beside(sections, options, folder)
            for row in rows:
                outcome.add(row)
    print(f"\n{outcome.table()}\n\n{outcome.path}", flush=True)
    return 0 if outcome.is_right else 1


def _together(names: list[str]) -> Iterator[list[Section]]:
    """The sections asked for, in their order: those that only compare at once, then one after another."""
    chosen = [section for section in SECTIONS if section.name in names]
    beside = [section for section in chosen if not section.is_alone]
    yield from ([beside] if beside else [])
    yield from ([section] for section in chosen if section.is_alone)


def _run_beside(sections: list[Section], options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Here, one after another."""
    for section in sections:
        path = folder / f"{section.name}.json"
        _run_here(section, options, path)
        row: Row = json.loads(path.read_text())
        yield row


def _run_here(section: Section, options: argparse.Namespace, path: Path) -> int:
    until_s = time.monotonic() + section.budget_s if options.until is None else options.until
    setting = _setting(options, section.shape)
    report = SectionReport(name=section.name, path=path, until_s=until_s, probe=setting.synchronize)
    if options.resume:
        report.resume()
    report.save()
    status = 1
    try:
        section.load()(setting, report)
    except Exception as error:  # A section that breaks must not take the others along; it is recorded.
        report.break_off(error)
        status = BROKEN_STATUS if _is_broken(setting) else 1
    report.save()
    return status if report.failed or report.error else 0


def _is_broken(setting: Setting) -> bool:
    """An illegal access stays with the process: nothing runs on the device behind it."""
    try:
        setting.synchronize()
    except RuntimeError:
        return True
    return False


def _setting(options: argparse.Namespace, shape: str = "") -> Setting:
    import torch

    from bench.gpu_check.setting import Setting

    return Setting(
        device=torch.device(options.device), is_tiny=options.tiny, is_quick=options.quick, shape=shape
    )


if __name__ == "__main__":
    sys.exit(main())
