"""One `up` per folder, and a state file that never speaks for a process that is gone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.command_error import CommandError
from cluster.serving.run_folder import RunFolder, UpState, last_words, read_state


@pytest.fixture
def path() -> Iterator[Path]:
    # Not tmp_path, which is longer than socket paths allow.
    with tempfile.TemporaryDirectory(prefix="wl-", dir="/tmp") as folder:
        yield Path(folder)


def make_state() -> UpState:
    return UpState(pid=os.getpid(), created_s=psutil.Process().create_time(), grpc="127.0.0.1:1")


def test_the_folder_is_private(path: Path) -> None:
    folder = RunFolder(path / "run")
    folder.prepare()
    assert folder.path.stat().st_mode & 0o777 == 0o700


def test_a_folder_open_to_others_is_refused(path: Path) -> None:
    path.chmod(0o777)
    with pytest.raises(CommandError, match="open to others"):
        RunFolder(path).prepare()


def test_shared_memory_that_somebody_else_laid_out_is_refused(path: Path) -> None:
    folder = RunFolder(path)
    folder.shared_dir.mkdir()
    try:
        folder.shared_dir.chmod(0o777)
        with pytest.raises(CommandError, match=r"/dev/shm/wattline-.* is open to others"):
            folder.prepare_shared()
        folder.shared_dir.chmod(0o700)
        folder.prepare_shared()
    finally:
        folder.shared_dir.rmdir()


def test_a_path_too_long_for_sockets_is_refused(path: Path) -> None:
    with pytest.raises(CommandError, match=r"runtime_dir: .* is \d+ characters long"):
        RunFolder(path / ("x" * 40)).prepare()


def test_a_second_up_in_the_folder_is_refused_and_names_the_first(path: Path) -> None:
    first, second = RunFolder(path), RunFolder(path)
    first.acquire()
    first.write_state(make_state())
    with pytest.raises(CommandError, match=f"process {os.getpid()} already runs `wattline up`"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_state_is_read_back_until_released(path: Path) -> None:
    folder, state = RunFolder(path), make_state()
    folder.acquire()
    folder.write_state(state)
    assert read_state(path) == state
    folder.release()
    assert read_state(path) is None


def test_state_of_an_earlier_process_with_the_same_number_is_ignored(path: Path) -> None:
    RunFolder(path).write_state(replace(make_state(), created_s=1.0))
    assert read_state(path) is None


def test_state_that_others_could_have_written_is_none(path: Path) -> None:
    RunFolder(path).write_state(make_state())
    path.chmod(0o777)
    assert read_state(path) is None


def test_broken_state_is_no_state(path: Path) -> None:
    (path / "up.json").write_text("{")
    assert read_state(path) is None


def test_last_words_are_the_last_line_that_says_something(path: Path) -> None:
    log = path / "log"
    log.write_text("one\ntwo\n\n  \n")
    assert last_words(log) == "two"
    assert last_words(path / "missing") == ""
