"""The file and the table that a whole check leaves: its sections, and on what they ran."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.gpu_check.report import Row
from bench.gpu_check.setting import Setting

_ROOT = Path(__file__).resolve().parents[2]
_VERSIONED = ("torch", "triton", "transformers", "safetensors", "numpy", "nvidia-ml-py")


@dataclass(slots=True)
class Outcome:
    """Sections as they end; saved after each."""

    path: Path
    head: Row
    sections: list[Row] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """No check failed and no section broke off. Skipped is not failed."""
        return all(not section["failed"] and not section["error"] for section in self.sections)

    def add(self, section: Row) -> None:
        self.sections.append(section)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.head | {"sections": self.sections}, indent=1) + "\n")

    def table(self) -> str:
        lines = [f"{'section':<10} {'rows':>5} {'failed':>7} {'skipped':>8} {'seconds':>8}  error"]
        for one in self.sections:
            rows, skipped = one["rows"], one["skipped"]
            assert isinstance(rows, list)
            assert isinstance(skipped, list)
            lines.append(
                f"{one['section']:<10} {len(rows):>5} {one['failed']:>7} {len(skipped):>8} "
                f"{one['seconds']:>8}  {str(one['error'])[:120]}"
            )
        return "\n".join(lines)


def make_outcome(setting: Setting, path: Path | None, arguments: Sequence[str]) -> Outcome:
    """Default file: bench/results/gpu-<name>-<date>.json; a tiny run on a CPU is no result and says so."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    device = torch.cuda.get_device_name(setting.device) if setting.is_cuda else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-")
    head: Row = {
        "command": "python -m bench.gpu_check " + " ".join(arguments),
        "date": today,
        "revision": _revision(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | _versions(),
        "hardware": {
            "device": device,
            "memory_bytes": _memory_bytes(setting),
            "cores": os.cpu_count(),
            "platform": platform.platform(),
        },
        "is_tiny": setting.is_tiny,
        "load_average": list(os.getloadavg()),
    }
    return Outcome(path=path or _ROOT / "bench" / "results" / f"gpu-{name}-{today}.json", head=head)


def _versions() -> dict[str, str]:
    found = {}
    for one in _VERSIONED:
        try:
            found[one] = importlib.metadata.version(one)
        except importlib.metadata.PackageNotFoundError:
            found[one] = "not installed"
    return found


def _revision() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _memory_bytes(setting: Setting) -> int | None:
    if not setting.is_cuda:
        return None
    return torch.cuda.get_device_properties(setting.device).total_memory
