"""The ledger child of `up`: what it cannot have now it gets later, and serving goes on meanwhile."""

from __future__ import annotations

import tempfile
from pathlib import Path

import psutil
import pytest

from cluster.config import parse_config
from cluster.serving.ledger_process import MAX_DELAY_S, LedgerProcess
from cluster.serving.run_folder import RunFolder

pytestmark = pytest.mark.processes


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "cluster.ledger" in child.cmdline()
    ]


def test_a_store_that_cannot_be_started_again_is_tried_again() -> None:
    now_s = [0.0]
    with tempfile.TemporaryDirectory(prefix="wl-", dir="/tmp") as parent:
        folder = RunFolder(Path(parent) / "run")
        folder.path.mkdir()
        config = parse_config({"models": [{"name": "m", "source": "null"}], "runtime_dir": str(folder.path)})
        ledger = LedgerProcess(config, folder, clock=lambda: now_s[0])
        try:
            ledger.start()
            (child,) = children()
            child.kill()
            psutil.wait_procs([child])
            away = folder.path.rename(Path(parent) / "away")
            for _ in range(3):
                ledger.tend()
                now_s[0] += MAX_DELAY_S
            assert children() == []
            away.rename(folder.path)
            ledger.tend()
            assert len(children()) == 1
        finally:
            ledger.stop()
