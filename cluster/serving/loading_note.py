"""How far the ranks of a replica are with loading: a small file that `up` shows while it waits.

Written by the replica, read by `up` on the same host; on other hosts nobody reads it, and nobody misses it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """The slowest rank of a model's replicas that still load: its stage, and the part of it that is done."""

    stage: str
    fraction: float


class LoadingNote:
    """The file of one replica."""

    def __init__(self, runtime_dir: Path, model: str) -> None:
        self._model = model
        self._path = runtime_dir / f"loading-{os.getpid()}.json"

    def write(self, stages: Sequence[tuple[str, int, int]]) -> None:
        """(stage, done, total) of every rank. Replaced in one go, so that no reader sees half of it.

        A full or missing folder costs the screen of `up`, not the replica.
        """
        if not stages:
            return
        stage, done, total = min(stages, key=lambda one: _fraction(one[1], one[2]))
        note = json.dumps({"model": self._model, "stage": stage, "fraction": _fraction(done, total)})
        fresh = self._path.with_suffix(".new")
        with suppress(OSError):
            fresh.write_text(note)
            fresh.replace(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def read_loading(runtime_dir: Path) -> dict[str, Loading]:
    """By model: the replica that is least far."""
    least: dict[str, Loading] = {}
    for path in runtime_dir.glob("loading-*.json"):
        with suppress(OSError, ValueError, KeyError):
            note = json.loads(path.read_text())
            loading = Loading(stage=str(note["stage"]), fraction=float(note["fraction"]))
            known = least.get(note["model"])
            if known is None or loading.fraction < known.fraction:
                least[note["model"]] = loading
    return least


def _fraction(done: int, total: int) -> float:
    return done / total if total else 0.0
