"""Sections in processes of their own: a kernel that hangs or breaks the device costs little.

A process whose device broke, or that died, is followed by another one that goes on behind the attempt that
did it. Called by `__main__.py`; knows nothing of what sections do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_check.report import Row
from bench.gpu_check.sections import Section

GRACE_S = 10.0
"""A process that is this much over its time is killed."""
BROKEN_STATUS = 3
"""Of a process whose device does not answer any more."""
_ENDED = (0, 1)
_MOST_RESTARTS = 4
_POLL_S = 0.05
_LEAST_S = 5.0
"""With less time left than this, nothing is begun."""


@dataclass(slots=True)
class _Run:
    """A section under way."""

    section: Section
    path: Path
    until_s: float
    process: subprocess.Popen[bytes]
    begun: int = 0
    restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """How section processes are started: `options` follow the section's own; all is over at `end_s`."""

    folder: Path
    options: Sequence[str]
    end_s: float
    program: Sequence[str] = (sys.executable, "-m", "bench.gpu_check")

    def run(self, sections: Iterable[Section]) -> Iterator[Row]:
        """Side by side; the row of each as it ends."""
        waiting: list[_Run] = []
        for section in sections:
            path = self.folder / f"{section.name}.json"
            until_s = min(time.monotonic() + section.budget_s, self.end_s - GRACE_S)
            if until_s - time.monotonic() < _LEAST_S:
                yield _broken(section, path, "not run: the time is over")
            else:
                waiting.append(_Run(section, path, until_s, self._start(section, path, until_s)))
        while waiting:
            for one in list(waiting):
                row = self._look_at(one)
                if row is not None:
                    waiting.remove(one)
                    yield row
            time.sleep(_POLL_S)

    def _start(
        self, section: Section, path: Path, until_s: float, *, is_resumed: bool = False
    ) -> subprocess.Popen[bytes]:
        command = [*self.program, "--only", section.name, "--section-file", str(path)]
        command += ["--until", str(until_s), *self.options]
        # Nothing here needs a network, and a library that looks for one must not wait for it.
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        return subprocess.Popen([*command, *(["--resume"] if is_resumed else [])], env=os.environ | offline)

    def _look_at(self, one: _Run) -> Row | None:
        """Its row, once it has ended for good."""
        status = one.process.poll()
        if status is None:
            if time.monotonic() < one.until_s + GRACE_S:
                return None
            one.process.kill()
            one.process.wait()
            return _broken(one.section, one.path, "killed: it was over its time")
        if status in _ENDED and one.path.exists():
            return _read(one.path)
        if self._goes_on(one):
            return None
        return _broken(one.section, one.path, f"its process ended with status {status}")

    def _goes_on(self, one: _Run) -> bool:
        """Start a process behind the attempt that broke the last one, if that got anywhere."""
        begun = _begun(one.path)
        has_time = one.until_s - time.monotonic() > _LEAST_S
        if begun <= one.begun or one.restarts == _MOST_RESTARTS or not has_time:
            return False
        one.begun, one.restarts = begun, one.restarts + 1
        one.process = self._start(one.section, one.path, one.until_s, is_resumed=True)
        return True


def _begun(path: Path) -> int:
    return int(str(_read(path)["begun"])) if path.exists() else 0


def _broken(section: Section, path: Path, error: str) -> Row:
    """What the section had saved, with why it ended."""
    row = _read(path) if path.exists() else {"section": section.name, "seconds": 0, "failed": 0}
    reason = f"{error}; {row['error']}" if row.get("error") else error
    return {"skipped": [], "rows": []} | row | {"error": reason}


def _read(path: Path) -> Row:
    row: Row = json.loads(path.read_text())
    return row
