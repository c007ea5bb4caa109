"""A folder is itself; a hub id that cannot be had is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.sources import SourceError, resolve_source


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path


def test_an_unknown_hub_id_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError) as caught:
        resolve_source("nobody/no-such-model", revision="v1")
    text = str(caught.value)
    assert "source 'nobody/no-such-model' (revision 'v1') is not in the local cache" in text
    assert "hf download nobody/no-such-model --revision v1" in text


def test_a_missing_folder_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(SourceError, match="source '/no/such/model' is no folder on this machine"):
        resolve_source("/no/such/model")


def test_a_word_that_is_no_hub_id_is_refused() -> None:
    with pytest.raises(SourceError, match="cannot be fetched"):
        resolve_source("not a/hub id/at all")
