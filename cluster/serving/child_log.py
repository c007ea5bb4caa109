"""What the children of `up` say: a log that several may write, and the one before it, both of bounded size.

A child's standard output and error are the file itself, so that tracebacks and the words of C libraries are
in it, and whoever reads it finds it under one name. Everyone appends: a log that is cut goes on at its start.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

MAX_LOG_BYTES = 16 * 2**20


def open_log(path: Path) -> BinaryIO:
    """To hand to a child."""
    return path.open("ab")


def bound_log(path: Path, *, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Call it now and then: copies a full log to `<name>.1` and cuts it to nothing.

    What is written between the two is lost. Where a full disk allows no copy the log is cut all the same.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return
        older = path.with_name(f"{path.name}.1")
        with suppress(OSError):
            older.unlink(missing_ok=True)
            shutil.copyfile(path, older)
        os.truncate(path, 0)
    except FileNotFoundError:
        return  # Nobody has written one yet, or it was taken away.
