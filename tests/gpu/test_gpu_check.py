"""The GPU check itself, on tiny shapes without a GPU: every section runs or says what it left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install 'wattline[gpu]')")

from bench.gpu_check.__main__ import main
from bench.gpu_check.report import SectionReport

IS_CUDA = torch.cuda.is_available()


@pytest.mark.skipif(IS_CUDA, reason="the interpreter is chosen for the whole process")
def test_all_sections_run_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "check.json"
    sections = ["numerics", "graphs", "engine", "meter", "rates", "speed", "peer", "one-shot"]
    arguments = ["--device", "cpu", "--tiny", "--json", str(path)]
    assert main(arguments + [word for name in sections for word in ("--only", name)]) == 0
    body = json.loads(path.read_text())
    assert [one["section"] for one in body["sections"]] == sections
    assert not any(one["failed"] or one["error"] for one in body["sections"])
    assert all(one["rows"] or one["skipped"] for one in body["sections"])
    speed = body["sections"][5]["rows"]
    assert {row["phase"] for row in speed if "phase" in row} == {"prefill", "decode"}
    assert "skipped: the energy counter" in capsys.readouterr().out


@pytest.mark.skipif(IS_CUDA, reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "no CUDA device here" in errors[0]


def test_a_section_that_breaks_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.gpu_check import meter, rates

    def break_off(setting: object, report: SectionReport) -> None:
        report.row(half="done")
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(rates, "run", break_off)
    monkeypatch.setattr(meter, "run", lambda setting, report: report.check(False, claim="one is two"))
    path = tmp_path / "check.json"
    arguments = ["--device", "cpu", "--tiny", "--only", "meter", "--only", "rates", "--only", "graphs"]
    monkeypatch.setattr("bench.gpu_check.graphs.run", lambda setting, report: report.row(ran=True))
    assert main([*arguments, "--json", str(path)]) == 1
    graphs, failed, broken = json.loads(path.read_text())["sections"]
    assert graphs["rows"] == [{"ran": True}]
    assert failed["failed"] == 1
    assert broken["rows"] == [{"half": "done"}]
    assert broken["error"] == "RuntimeError: the device is gone"
