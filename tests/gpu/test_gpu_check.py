"""The GPU check itself, on tiny shapes without a GPU: every section runs or says what it left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install 'wattline[gpu]')")

from bench.gpu_check.__main__ import main
from bench.gpu_check.report import SectionReport
from bench.gpu_check.sections import SECTIONS

IS_CUDA = torch.cuda.is_available()
NAMES = [one.name for one in SECTIONS if one.name not in ("kernels", "speed-8b", "speed-moe")]
"""Kernels have a test of their own, and tiny speed sections are all about one shape."""


@pytest.mark.skipif(IS_CUDA, reason="the interpreter is chosen for the whole process")
@pytest.mark.parametrize("section", NAMES)
def test_a_section_runs_without_a_gpu_or_says_what_it_left_out(section: str, tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    assert main(["--device", "cpu", "--tiny", "--only", section, "--json", str(path)]) == 0
    (ran,) = json.loads(path.read_text())["sections"]
    assert ran["section"] == section
    assert ran["rows"] or ran["skipped"]
    assert not ran["failed"]
    assert not ran["error"]


@pytest.mark.skipif(IS_CUDA, reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "no CUDA device here" in errors[0]


def test_the_bfloat16_reference_keeps_its_angles_in_float32() -> None:
    """Rounded frequencies would be another model: ours has them whole, as has one that was loaded."""
    from bench.gpu_check.numerics import in_bfloat16
    from bench.gpu_check.shapes import small_shapes

    shape = small_shapes(is_tiny=True)[0]
    model = shape.model(shape.config)
    with torch.inference_mode():
        half = in_bfloat16(model)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    frequencies, wanted = (dict(one.named_buffers())["model.rotary_emb.inv_freq"] for one in (half, model))
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, wanted)


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
    graphs, broken, failed = json.loads(path.read_text())["sections"]
    assert graphs["rows"] == [{"ran": True}]
    assert failed["failed"] == 1
    assert broken["rows"] == [{"half": "done"}]
    assert broken["error"] == "RuntimeError: the device is gone"
    assert "break_off" in broken["trace"]
