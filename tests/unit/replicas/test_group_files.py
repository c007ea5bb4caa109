"""Names of a group's files: short, safe, its own; and the removal of what it left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from replicas.config import ReplicaConfig
from replicas.supervisor.engine_socket import EngineSocket
from replicas.supervisor.group_files import GroupFiles


def make_config(folder: Path, replica_id: str) -> ReplicaConfig:
    return ReplicaConfig(
        model="m",
        source="null",
        replica_id=replica_id,
        routers=(),
        runtime_dir=str(folder / "run"),
        shared_dir=str(folder),
    )


def test_any_replica_id_makes_a_safe_name(tmp_path: Path) -> None:
    files = GroupFiles.of(make_config(tmp_path, "app#model/éx" + "y" * 200), epoch=3)
    assert files.group.startswith("app-model-xyyy")
    assert files.group.replace("-", "").isalnum()
    assert len(files.group) <= 50


def test_ids_that_look_alike_and_epochs_stay_apart(tmp_path: Path) -> None:
    a = GroupFiles.of(make_config(tmp_path, "a/1"), epoch=3)
    b = GroupFiles.of(make_config(tmp_path, "a-1"), epoch=3)
    assert a.group != b.group
    assert len({a.socket_path, b.socket_path, replace(a, epoch=4).socket_path}) == 3


def test_only_the_files_of_the_group_are_removed(tmp_path: Path) -> None:
    files = GroupFiles.of(make_config(tmp_path, "a"), epoch=3)
    (tmp_path / f"{files.group}.3.collectives").touch()
    (tmp_path / f"{files.group}0.3.collectives").touch()
    (tmp_path / "other").touch()
    files.remove_shared()
    assert {path.name for path in tmp_path.iterdir()} == {f"{files.group}0.3.collectives", "other"}


def test_a_socket_path_too_long_for_the_kernel_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="choose a shorter runtime_dir"):
        EngineSocket(Path("/tmp") / ("x" * 120))
