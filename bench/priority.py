"""`nice python -m bench ...` reaches every process that a measurement starts.

Linux schedules the processes of a session as a group (autogroup), and a new session begins at nice 0
whatever its parent has. Engines run in sessions of their own.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil


def share_priority(pid: int) -> None:
    """Give the session of `pid` the nice value of this process; nothing where sessions are no groups."""
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(os.getpriority(os.PRIO_PROCESS, 0)))


def share_priority_below() -> None:
    """The same for every process below this one: Ray starts some in sessions of their own."""
    for child in psutil.Process().children(recursive=True):
        share_priority(child.pid)
