"""What a process builds at its start and keeps: the garbage collector need not look through it for ever."""

from __future__ import annotations

import gc


def spare_the_collector() -> None:
    """Call it once, when what lives as long as the process is there.

    Nothing of it will be garbage, and a full collection goes through all of it while nothing else runs: it
    takes 100 ms of a step for torch, nearly as much of a router's event loop, and holds up every stream.
    """
    gc.collect()
    gc.freeze()
