"""What every result file says beside its numbers: command, versions, hardware, load, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS_DIR = ROOT / "bench" / "results"
VERSIONED = ("wattline", "torch", "transformers", "ray", "grpcio", "protobuf", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """Monotonic seconds of one request, seen by its client.

    `is_late` requests came on top of a closed loop; `head` are the first tokens of the answer, where kept.
    """

    submitted_s: float
    first_token_s: float
    last_token_s: float
    output_tokens: int
    longest_gap_s: float = 0.0
    is_late: bool = False
    head: tuple[int, ...] = ()

    @property
    def ttft_ms(self) -> float:
        return (self.first_token_s - self.submitted_s) * 1e3

    @property
    def tpot_ms(self) -> float:
        return (self.last_token_s - self.first_token_s) * 1e3 / max(1, self.output_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One workload driven to its end, in the order of its requests."""

    times: tuple[RequestTimes, ...]
    wall_s: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile of a non-empty sequence."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def summarize(times: Sequence[RequestTimes], *, wall_s: float, prompt_tokens: int) -> dict[str, float]:
    """The row fields that come from the clock. Late requests count in the rates and have their own TTFT."""
    output_tokens = sum(one.output_tokens for one in times)
    loop = [one for one in times if not one.is_late]
    ttft_ms, tpot_ms = [one.ttft_ms for one in loop], [one.tpot_ms for one in loop]
    row = {
        "output_tok_s": output_tokens / wall_s,
        "total_tok_s": (output_tokens + prompt_tokens) / wall_s,
        "ttft_ms_p50": statistics.median(ttft_ms),
        "ttft_ms_p99": percentile(ttft_ms, 99),
        "tpot_ms_p50": statistics.median(tpot_ms),
        "tpot_ms_p99": percentile(tpot_ms, 99),
    }
    late = [one.ttft_ms for one in times if one.is_late]
    if late:
        row |= {
            "late_ttft_ms_p50": statistics.median(late),
            "stall_ms_p50": statistics.median(one.longest_gap_s * 1e3 for one in loop),
        }
    return {key: round(value, 3) for key, value in row.items()}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def git_revision() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def write_results(name: str, rows: Sequence[dict[str, object]], path: Path | None, **more: object) -> Path:
    """Write one JSON file of `rows` and what else it says; default `bench/results/<name>-<date>.json`."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    target = path or RESULTS_DIR / f"{name}-{today}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    body = {
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "date": today,
        "revision": git_revision(),
        "versions": {"python": platform.python_version()}
        | {one: importlib.metadata.version(one) for one in VERSIONED},
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "load_average": list(os.getloadavg()),
        **more,
        "rows": list(rows),
    }
    target.write_text(json.dumps(body, indent=1) + "\n")
    return target
