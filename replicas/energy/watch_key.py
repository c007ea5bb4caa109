"""What a watch asks for: which meter of the host, for which devices or processes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from replicas.config import METERS

_MAX_DEVICES = 64
_MAX_PIDS = 1024


class WatchKey(NamedTuple):
    """Watches with equal keys share one meter."""

    meter: str
    gpu_uuids: tuple[str, ...]
    pids: tuple[int, ...]


def watch_key(meter: str, gpu_uuids: Sequence[str], pids: Sequence[int]) -> WatchKey:
    """A meter of the whole host is one, whoever asks: two pollers of it would export its joules twice.

    ValueError says what is wrong with it.
    """
    if meter and meter not in METERS:
        raise ValueError(f"meter={meter!r}; give one of {', '.join(METERS)}")
    if len(gpu_uuids) > _MAX_DEVICES:
        raise ValueError(f"gpu_uuids has {len(gpu_uuids)} entries, {_MAX_DEVICES} is the limit; watch fewer")
    if len(pids) > _MAX_PIDS:
        raise ValueError(f"pids has {len(pids)} entries, {_MAX_PIDS} is the limit; watch fewer")
    if meter in ("rapl", "zeus"):
        return WatchKey(meter, (), ())
    return WatchKey(meter or "auto", tuple(sorted(gpu_uuids)), tuple(sorted(pids)))
