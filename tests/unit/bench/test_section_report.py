"""A section's report: what one attempt raises costs itself, and a later process goes on behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu_check.report import SectionReport


def make_report(path: Path, *, until_s: float = 100.0) -> SectionReport:
    return SectionReport(name="kernels", path=path, until_s=until_s, clock=lambda: 0.0)


def fail() -> None:
    raise ValueError("no such layout")


def test_an_attempt_that_raises_is_a_failed_row_with_its_traceback_and_the_next_runs(tmp_path: Path) -> None:
    report = make_report(tmp_path / "kernels.json")
    report.attempt("first", fail)
    report.attempt("second", lambda: report.check(True, case="second"))
    first, second = report.rows
    assert (first["ok"], first["attempt"], first["error"]) == (False, "first", "ValueError: no such layout")
    assert "in fail" in str(first["trace"])
    assert second == {"ok": True, "case": "second"}
    assert report.failed == 1


def test_a_broken_device_ends_the_section(tmp_path: Path) -> None:
    report = make_report(tmp_path / "kernels.json")

    def probe() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    report.probe = probe
    with pytest.raises(RuntimeError, match="illegal"):
        report.attempt("first", fail)
    assert json.loads(report.path.read_text())["rows"][0]["attempt"] == "first"


def test_a_process_that_died_is_followed_by_one_that_goes_on_behind_its_attempt(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    died = make_report(path)
    died.attempt("first", lambda: died.check(True, case="first"))
    ran: list[str] = []

    class Killed(BaseException):
        """Nothing that an attempt may catch."""

    def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        died.attempt("second", die)
    after = make_report(path)
    after.resume()
    for name in ("first", "second", "third"):
        after.attempt(name, lambda name=name: ran.append(name))  # type: ignore[misc]
    assert ran == ["third"]
    assert after.rows == [
        {"ok": True, "case": "first"},
        {"ok": False, "attempt": "second", "error": "the process ended here"},
    ]
    assert after.failed == 1


def test_time_ends_at_a_moment_given_from_outside(tmp_path: Path) -> None:
    report = make_report(tmp_path / "kernels.json", until_s=10.0)
    assert report.has_time(9.0)
    assert not report.has_time(11.0)
