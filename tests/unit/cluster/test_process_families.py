"""Processes are killed with all below them, and never one that only has the number of another."""

from __future__ import annotations

import subprocess

import psutil
import pytest

from cluster.serving.process_families import SAME_START_S, end_families

pytestmark = pytest.mark.processes

WITH_CHILD = "sleep 1000 & echo $!; wait"


def test_a_process_goes_with_its_children_and_another_of_its_number_stays() -> None:
    with subprocess.Popen(["sh", "-c", WITH_CHILD], stdout=subprocess.PIPE, text=True) as head:
        assert head.stdout
        child = psutil.Process(int(head.stdout.readline()))
        started_s = psutil.Process(head.pid).create_time()
        assert end_families([(head.pid, started_s - 2 * SAME_START_S)], 0.1) == []
        assert head.poll() is None
        assert end_families([(head.pid, started_s)], 60.0) == []
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_one_that_is_gone_already_is_no_error() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert end_families([(process.pid, 0.0)], 1.0) == []
