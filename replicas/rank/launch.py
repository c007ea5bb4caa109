"""Runs a module as a child that dies with its parent.

`python -m replicas.rank.launch PARENT_PID MODULE ARGS...`. The kernel is asked for SIGKILL at the parent's
death before anything else is imported; a parent that died before that is seen by its changed pid. In the
child and not between fork and exec, because the parent runs threads (gRPC), where Python code after a fork
may deadlock. Called by `rank_group.py`.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Exit now if the parent is gone, and at its death from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


def main(arguments: list[str]) -> None:
    parent_pid, module = int(arguments[0]), arguments[1]
    die_with_parent(parent_pid)
    sys.argv = [module, *arguments[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
