"""One ledger store per file and per socket. A second one would take the socket away from the first."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.command_error import CommandError


@contextmanager
def held_alone(*paths: Path) -> Iterator[None]:
    """Hold a lock beside each path. They go with the process, however that ends.

    Raises CommandError while another process holds one.
    """
    with ExitStack() as stack:
        for path in dict.fromkeys(path.with_name(f"{path.name}.lock") for path in paths):
            lock = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CommandError(
                    f"another ledger store holds {path}; `wattline up` runs one of its own: end that one, "
                    "or set ledger.path and runtime_dir to others"
                ) from error
        yield
