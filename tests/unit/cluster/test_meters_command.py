"""`wattline meters` on whatever host this is: a table for people, JSON for programs."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.meters import describe_accuracy


def test_the_table_has_the_estimate_that_every_host_has() -> None:
    answer = CliRunner().invoke(app, ["meters"], env={"COLUMNS": "200"})
    assert answer.exit_code == 0
    assert "cpu-model" in answer.output
    assert "within a factor of 2" in answer.output
    assert "auto reads nvml for replicas on GPUs" in answer.output


def test_json_has_every_meter_with_its_reason() -> None:
    answer = CliRunner().invoke(app, ["meters", "--json"])
    rows = json.loads(answer.output)
    assert {row["name"] for row in rows} == {"nvml", "rapl", "zeus", "cpu-model"}
    assert all(row["is_available"] or row["detail"] for row in rows)


@pytest.mark.parametrize(
    ("factor", "words"), [(1.05, "within 5%"), (1.25, "within 25%"), (2.0, "within a factor of 2")]
)
def test_accuracy_in_words(factor: float, words: str) -> None:
    assert describe_accuracy(factor) == words
