"""Section processes side by side: each row comes back, whatever became of the process that wrote it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench.gpu_check.apart import Apart
from bench.gpu_check.report import Row
from bench.gpu_check.sections import Section

PROGRAM = """
import argparse, os, signal, sys, time
from pathlib import Path
from bench.gpu_check.report import SectionReport
parser = argparse.ArgumentParser()
for name in ("--only", "--section-file", "--until"):
    parser.add_argument(name)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()
report = SectionReport(name=options.only, path=Path(options.section_file), until_s=float(options.until))
if options.resume:
    report.resume()
report.save()
def die():
    report.row(half="done")
    os.kill(os.getpid(), signal.SIGKILL)
report.attempt("first", lambda: report.check(True, case="first"))
report.attempt("second", die if options.only == "dies" else lambda: report.check(True, case="second"))
report.attempt("third", lambda: report.check(True, case="third"))
if options.only == "hangs":
    time.sleep(600)
sys.exit(1 if report.failed else 0)
"""


def make_section(name: str, budget_s: float = 60.0) -> Section:
    return Section(name=name, module="none", budget_s=budget_s, answers="")


def run(tmp_path: Path, *sections: Section, seconds: float = 100.0) -> dict[object, Row]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    apart = Apart(
        folder=tmp_path,
        options=(),
        end_s=time.monotonic() + seconds,
        program=(sys.executable, str(script)),
    )
    return {row["section"]: row for row in apart.run(sections)}


@pytest.mark.processes
def test_a_process_that_is_killed_loses_one_attempt(tmp_path: Path) -> None:
    rows = run(tmp_path, make_section("dies"), make_section("lives"))
    assert rows["dies"]["rows"] == [
        {"ok": True, "case": "first"},
        {"half": "done"},
        {"ok": False, "attempt": "second", "error": "the process ended here"},
        {"ok": True, "case": "third"},
    ]
    assert (rows["dies"]["failed"], rows["dies"]["error"]) == (1, "")
    assert (rows["lives"]["failed"], rows["lives"]["begun"]) == (0, 3)


@pytest.mark.processes
def test_a_section_without_time_is_not_begun(tmp_path: Path) -> None:
    rows = run(tmp_path, make_section("late"), seconds=12.0)
    assert rows["late"]["error"] == "not run: the time is over"


@pytest.mark.processes
def test_a_process_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu_check.apart.GRACE_S", 0.0)
    monkeypatch.setattr("bench.gpu_check.apart._LEAST_S", 0.0)
    rows = run(tmp_path, make_section("hangs", budget_s=1.0))
    assert str(rows["hangs"]["error"]).startswith("killed: it was over its time")
