"""What the check found, written to its JSON file after every row, so that a crash loses one row at most."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Row = dict[str, object]


@dataclass(slots=True)
class SectionReport:
    """Rows of one section, in the file they go to. `failed` counts checks that did not hold."""

    name: str
    path: Path
    budget_s: float
    clock: Callable[[], float] = time.monotonic
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: int = 0
    error: str = ""
    _began_s: float = 0.0

    def __post_init__(self) -> None:
        self._began_s = self.clock()

    def row(self, **values: object) -> None:
        """Add a row, print it, and save; floats keep four digits."""
        rounded = {key: float(f"{one:.4g}") if isinstance(one, float) else one for key, one in values.items()}
        self.rows.append(rounded)
        print("  " + "  ".join(f"{key}={_short(one)}" for key, one in rounded.items()), flush=True)
        self.save()

    def check(self, is_right: bool, **values: object) -> None:
        """A row whose claim holds or not; one that does not makes the whole check fail."""
        self.failed += not is_right
        self.row(ok=is_right, **values)

    def skip(self, what: str) -> None:
        """Say what was left out, and why."""
        self.skipped.append(what)
        print(f"  skipped: {what}", flush=True)
        self.save()

    def has_time(self, needed_s: float = 0.0) -> bool:
        """Whether the section's budget still holds `needed_s` of work."""
        return self.clock() - self._began_s + needed_s < self.budget_s

    def save(self) -> None:
        self.path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def as_json(self) -> Row:
        return {
            "section": self.name,
            "seconds": round(self.clock() - self._began_s, 1),
            "failed": self.failed,
            "error": self.error,
            "skipped": self.skipped,
            "rows": self.rows,
        }


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
