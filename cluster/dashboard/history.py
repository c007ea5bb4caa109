"""The last quarter of an hour, a point a second: so that a page opened now shows what happened before.

Columns, not objects: a point is a tuple of numbers per model, in the order of `SERIES`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

HISTORY_POINTS = 900
MAX_REPLICA_LINES = 16
"""Replicas with a power line of their own: those that draw most."""

SERIES = (
    "output_tokens_per_s",
    "ttft_p50_ms",
    "ttft_p95_ms",
    "tpot_p50_ms",
    "tpot_p95_ms",
    "j_per_output_token",
    "j_per_total_token",
    "prefill_w",
    "decode_w",
    "idle_w",
    "unattributed_w",
    "meter_w",
    "static_w",
    "host_w",
    "running",
    "waiting",
    "kv_used_ratio",
    "slo_met",
    "slo_missed",
    "expert_imbalance",
    "expert_imbalance_without_copies",
    "replicas_ready",
    "replicas_wanted",
)

Row = tuple[float | None, ...]


class History:
    """A bounded ring of points. Mutable; owned by the event loop."""

    def __init__(self, capacity: int = HISTORY_POINTS) -> None:
        self._points: deque[dict[str, Any]] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._points)

    def add(self, point: dict[str, Any]) -> None:
        """A point made by `point_of`."""
        self._points.append(point)

    def points(self) -> list[dict[str, Any]]:
        """A copy, oldest first."""
        return list(self._points)


def point_of(snapshot: dict[str, Any], *, unix_s: float) -> dict[str, Any]:
    """The numbers of a snapshot that have a line in a chart."""
    powers = sorted(
        ((replica["id"], replica["power_w"]) for replica in snapshot["replicas"] if replica["power_w"]),
        key=lambda one: -one[1],
    )
    return {
        "t": round(unix_s, 2),
        "models": {model["name"]: _row(model) for model in snapshot["models"]},
        "replicas_w": {replica_id: _short(power_w) for replica_id, power_w in powers[:MAX_REPLICA_LINES]},
    }


def _row(model: dict[str, Any]) -> Row:
    power, experts, host = model["power_w"] or {}, model["experts"] or {}, model["host"] or {}
    values = {
        "output_tokens_per_s": model["output_tokens_per_s"],
        "ttft_p50_ms": model["ttft_ms"]["p50"],
        "ttft_p95_ms": model["ttft_ms"]["p95"],
        "tpot_p50_ms": model["tpot_ms"]["p50"],
        "tpot_p95_ms": model["tpot_ms"]["p95"],
        "j_per_output_token": model["j_per_output_token"],
        "j_per_total_token": model["j_per_total_token"],
        "running": model["running"],
        "waiting": model["waiting"],
        "kv_used_ratio": model["kv_used_ratio"],
        "slo_met": model["slo"]["met"],
        "slo_missed": model["slo"]["missed"],
        "expert_imbalance": experts.get("imbalance"),
        "expert_imbalance_without_copies": experts.get("imbalance_without_copies"),
        "host_w": host.get("power_w"),
        "replicas_ready": model["replicas"]["ready"],
        "replicas_wanted": model["replicas"]["min"],
        **power,
    }
    return tuple(_short(values.get(name)) for name in SERIES)


def _short(value: float | None) -> float | None:
    """Six significant digits are more than a line can show; counts stay whole."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
