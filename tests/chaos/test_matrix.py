"""The table of docs/reliability.md names every case of the fault matrix, and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.chaos

TESTS = Path(__file__).resolve().parents[1]
NUM_CASES = 25
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    """The cells of each case."""
    lines = (TESTS.parent / "docs" / "reliability.md").read_text().splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d", line)
    ]


def test_every_case_has_a_promise_and_a_test_or_a_reason() -> None:
    assert [int(row[0]) for row in rows()] == list(range(1, NUM_CASES + 1))
    for number, fault, promise, tests, reason in rows():
        assert fault and promise, number
        assert NAMED.search(tests) or reason.startswith("not tested: "), number


def test_every_named_test_exists() -> None:
    for path, name in {found for row in rows() for found in NAMED.findall(row[3])}:
        tree = ast.parse((TESTS / path).read_text())
        assert name in {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }, f"{path}::{name}"
