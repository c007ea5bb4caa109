"""What the check found, written to its JSON file after every row, so that a crash loses one row at most."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Row = dict[str, object]

_TRACE_CHARACTERS = 4000


def _no_probe() -> None:
    """A host does not break."""


@dataclass(slots=True)
class SectionReport:
    """Rows of one section, in the file they go to. `failed` counts checks that did not hold.

    `until_s` is a moment of `clock`. `probe` raises where the device is beyond use. A process that goes on
    where another broke off has its rows and does not repeat what that one began: `resume`.
    """

    name: str
    path: Path
    until_s: float
    clock: Callable[[], float] = time.monotonic
    probe: Callable[[], None] = _no_probe
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: int = 0
    error: str = ""
    trace: str = ""
    begun: int = 0
    _in_attempt: str = ""
    _seconds_before: float = 0.0
    _done_before: int = 0
    _began_s: float = 0.0

    def __post_init__(self) -> None:
        self._began_s = self.clock()

    def resume(self) -> None:
        """Take over what the file says; the attempt that was under way when it was written has failed."""
        said = json.loads(self.path.read_text())
        self.rows, self.skipped, self.failed = said["rows"], said["skipped"], said["failed"]
        self._seconds_before, self._done_before = said["seconds"], said["begun"]
        if said["in_attempt"]:
            self.check(False, attempt=said["in_attempt"], error="the process ended here")

    def row(self, **values: object) -> None:
        """Add a row, print it, and save; floats keep four digits."""
        rounded = {key: float(f"{one:.4g}") if isinstance(one, float) else one for key, one in values.items()}
        self.rows.append(rounded)
        shown = "  ".join(f"{key}={_short(one)}" for key, one in rounded.items() if key != "trace")
        print(f"  {self.name}: {shown}", flush=True)
        self.save()

    def check(self, is_right: bool, **values: object) -> None:
        """A row whose claim holds or not; one that does not makes the whole check fail."""
        self.failed += not is_right
        self.row(ok=is_right, **values)

    def attempt(self, what: str, run: Callable[[], object]) -> None:
        """Run it, unless an earlier process began it. What it raises costs a failed row with the traceback;
        the rest goes on, if the device still answers."""
        self.begun += 1
        if self.begun <= self._done_before:
            return
        self._in_attempt = what
        self.save()
        try:
            run()
        except Exception as error:  # Whatever one attempt raises must not take the others along.
            trace = traceback.format_exc()[-_TRACE_CHARACTERS:]
            print(trace, flush=True)
            self.check(False, attempt=what, error=f"{type(error).__name__}: {error}"[:500], trace=trace)
            self._in_attempt = ""
            self.probe()
        self._in_attempt = ""

    def break_off(self, error: Exception) -> None:
        """The section ends here, with this reason."""
        self.error = f"{type(error).__name__}: {error}"[:500]
        self.trace = traceback.format_exc()[-_TRACE_CHARACTERS:]
        print(self.trace, flush=True)

    def skip(self, what: str) -> None:
        """Say what was left out, and why."""
        self.skipped.append(what)
        print(f"  {self.name}: skipped: {what}", flush=True)
        self.save()

    def has_time(self, needed_s: float = 0.0) -> bool:
        """Whether the section's time still holds `needed_s` of work."""
        return self.clock() + needed_s < self.until_s

    def save(self) -> None:
        """A reader never finds half a file: this process may be killed at any moment."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        part.replace(self.path)

    def as_json(self) -> Row:
        return {
            "section": self.name,
            "seconds": round(self._seconds_before + self.clock() - self._began_s, 1),
            "failed": self.failed,
            "error": self.error,
            "trace": self.trace,
            "begun": self.begun,
            "in_attempt": self._in_attempt,
            "skipped": self.skipped,
            "rows": self.rows,
        }


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
