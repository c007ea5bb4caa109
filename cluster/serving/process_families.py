"""Processes of this machine with all below them: killed, and seen to be gone. Nothing of ours is imported.

A number alone may belong to another process by now, or to another machine: its start tells.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

SAME_START_S = 2.0
"""The system tells when a process started through its clock, which may be set."""
POLL_S = 0.01

Started = tuple[int, float]
"""A process: its number, and when it started, seconds since 1970."""


def this_process() -> Started:
    process = psutil.Process()
    return process.pid, process.create_time()


def end_families(heads: Sequence[Started], timeout_s: float) -> list[int]:
    """SIGKILL to each of `heads` and all its descendants; the numbers of those not gone after `timeout_s`."""
    family = [member for head in heads for member in _family(head)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    end_s = time.monotonic() + timeout_s
    while (alive := [member.pid for member in family if _lives(member)]) and time.monotonic() < end_s:
        time.sleep(POLL_S)
    return alive


def _lives(process: psutil.Process) -> bool:
    """What nobody has waited for yet does nothing any more, and stays where process 1 reaps none."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _family(head: Started) -> list[psutil.Process]:
    pid, started_s = head
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started_s) > SAME_START_S:
            return []
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
