"""A spec read apart is the one that is read here, and a reader that dies is no fault of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from replicas.models.config_file import read_spec
from replicas.models.spec_reader import read_spec_apart
from tests.demo_corpus import EXAMPLES_DIR

pytestmark = pytest.mark.processes


def test_both_ways_read_the_same() -> None:
    folder = EXAMPLES_DIR / "models" / "granite-moe-demo"
    assert read_spec_apart(folder) == read_spec(folder)


def test_the_last_words_of_a_reader_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text("raise SystemError('torn')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with pytest.raises(ChildProcessError, match="ended with code 1: SystemError: torn"):
        read_spec_apart(tmp_path)
