"""A log of children stays within its bound, under one name, while they write."""

from __future__ import annotations

from pathlib import Path

from cluster.serving.child_log import bound_log, open_log


def test_a_full_log_is_put_aside_and_goes_on_at_its_start(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    with open_log(path) as one, open_log(path) as other:
        for text in (b"first", b"second", b"third"):
            for log in (one, other):
                log.write(text)
                log.flush()
            bound_log(path, max_bytes=11)
    assert path.read_bytes() == b"thirdthird"
    assert (tmp_path / "router.log.1").read_bytes() == b"firstfirstsecondsecond"


def test_a_log_that_cannot_be_copied_is_cut_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ledger.log"
    path.write_bytes(bytes(100))
    path.with_name("ledger.log.1").mkdir()
    bound_log(path, max_bytes=10)
    assert path.read_bytes() == b""


def test_no_log_is_within_its_bound(tmp_path: Path) -> None:
    bound_log(tmp_path / "router.log")
    assert list(tmp_path.iterdir()) == []
