"""How far a replica's ranks are, as the screen of `up` reads it; where it cannot be written nobody minds."""

from __future__ import annotations

from pathlib import Path

from cluster.serving.loading_note import Loading, LoadingNote, read_loading


def test_the_rank_that_is_least_far_speaks_for_its_model_until_the_note_goes(tmp_path: Path) -> None:
    note = LoadingNote(tmp_path, "m")
    note.write([("weights", 3, 4), ("weights", 1, 4)])
    assert read_loading(tmp_path) == {"m": Loading(stage="weights", fraction=0.25)}
    note.remove()
    assert read_loading(tmp_path) == {}


def test_a_folder_that_is_gone_costs_the_note_and_not_the_replica(tmp_path: Path) -> None:
    note = LoadingNote(tmp_path / "gone", "m")
    note.write([("weights", 1, 2)])
    note.remove()
    assert read_loading(tmp_path / "gone") == {}
