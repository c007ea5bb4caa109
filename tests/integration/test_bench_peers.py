"""`python -m bench peers` beside transformers, on a tiny checkpoint and in this interpreter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from tests.checkpoints import make_llama

ROW_FIELDS = {
    "system",
    "version",
    "model",
    "dtype",
    "workload",
    "concurrency",
    "output_tok_s",
    "total_tok_s",
    "ttft_ms_p50",
    "ttft_ms_p99",
    "tpot_ms_p50",
    "tpot_ms_p99",
    "joules_per_output_token",
    "energy_source",
}
FILE_FIELDS = {"command", "versions", "hardware", "load_average", "date", "summary", "failures", "rows"}
SIZES = {"--output-tokens": "4", "--requests-per-stream": "1", "--rounds": "1", "--threads": "1"}
CASES = {"--workload": "mix,long", "--concurrency": "2", "--kernels": "off"}


@pytest.mark.processes
def test_engines_run_the_same_prompts_and_a_peer_that_cannot_start_is_named(tmp_path: Path) -> None:
    make_llama(tmp_path / "tiny")
    target = tmp_path / "result.json"
    options = [text for pair in (SIZES | CASES).items() for text in pair]
    peers = [f"--peer={name}={sys.executable}" for name in ("transformers", "openvino")]
    command = ["peers", "--model", str(tmp_path / "tiny"), "--json", str(target), *options, *peers]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output

    body = json.loads(target.read_text())
    assert body.keys() >= FILE_FIELDS
    assert [one["system"] for one in body["failures"]] == ["openvino"]
    assert [(row["workload"], row["system"]) for row in body["rows"]] == [
        ("mix", "wattline-off"),
        ("mix", "transformers"),
        ("long", "wattline-off"),
        ("long", "transformers"),
    ]
    for row in body["rows"]:
        assert row.keys() >= ROW_FIELDS
        assert row["heads"]["different"] == 0
        assert row["joules_per_output_token"] > 0
        assert (row["workload"] == "long") == ("tpot_p99_over_undisturbed" in row)
    assert body["rows"][0]["wattline-off_ratio"] == 1.0


def test_a_peer_without_an_interpreter_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["peers", "--model", str(tmp_path), "--peer", "vllm"])
    assert result.exit_code == 2
    assert "NAME=PYTHON" in result.output
