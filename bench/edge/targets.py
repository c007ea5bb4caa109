"""From rows to what they say: our throughput over the others', and whether each goal is met. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

OURS = ("wattline-1", "wattline-2")
ECHO, RELAY, RAY_SERVE = "echo", "relay", "ray-serve"
MIN_OVER_RAY_SERVE = 8.0
MIN_OVER_ECHO = 0.6
MAX_ADDED_TTFT_MS = 3.0
MAX_STALLED_MIB = 1.0
MIN_SHARE_KEPT = 0.97

Row = Mapping[str, object]


def median_rows(rows: Iterable[Row]) -> list[dict[str, object]]:
    """One row per system and number of streams: the median of its rounds, field by field.

    A field that is None in a round is None: a stream that starved once has starved.
    """
    groups: dict[tuple[object, object], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["system"], row["streams"]), []).append(row)
    return [
        {"system": system, "streams": streams, "rounds": len(group)}
        | {key: _median([row[key] for row in group]) for key in group[0] if key not in ("system", "streams")}
        for (system, streams), group in groups.items()
    ]


def throughput_ratios(rows: Sequence[Row]) -> list[dict[str, object]]:
    """By system of ours and number of streams, over those beside it: the median of the rounds' ratios.

    Rounds are told apart by their order, so that what slows the machine for a while slows both. None where
    the other stood still in a round.
    """
    rates: dict[tuple[object, object], list[float]] = {}
    for row in rows:
        rates.setdefault((row["system"], row["streams"]), []).append(_number(row["tok_s"]))
    return [
        {"system": system, "streams": streams}
        | {
            f"over_{other}": _over(own, rates[other, streams])
            for other in (ECHO, RELAY, RAY_SERVE)
            if (other, streams) in rates
        }
        for (system, streams), own in rates.items()
        if system in OURS
    ]


def _over(own: Sequence[float], others: Sequence[float]) -> float | None:
    """None: the other stood still in one of the rounds."""
    if not all(others):
        return None
    return round(statistics.median(a / b for a, b in zip(own, others, strict=True)), 3)


def goals(
    ratios: Sequence[Row], medians: Sequence[Row], ttft: Sequence[Row], stalled: Row
) -> list[dict[str, object]]:
    """Each goal with what was reached, at the worst number of streams of one router."""
    found = []
    one = [row for row in ratios if row["system"] == OURS[0]]
    for name, other, least in (
        ("tokens/s over Ray Serve's proxy", RAY_SERVE, MIN_OVER_RAY_SERVE),
        ("tokens/s over a bare echo", ECHO, MIN_OVER_ECHO),
    ):
        for row in one:
            if f"over_{other}" in row:
                reached = row[f"over_{other}"]
                is_met = reached is None or _number(reached) >= least
                found.append(_goal(f"{name} at {row['streams']}", reached, f">= {least}", is_met))
    for row in ttft:
        added = _number(row["added_ttft_ms_p50"])
        label = f"added TTFT p50 in ms at {row['streams']}"
        found.append(_goal(label, added, f"<= {MAX_ADDED_TTFT_MS}", added <= MAX_ADDED_TTFT_MS))
    for row in medians:
        if row["system"] in OURS:
            ratio = row["progress_ratio"]
            label = f"fastest over slowest stream, {row['system']} at {row['streams']}"
            found.append(_goal(label, ratio, "no stream starves", ratio is not None))
    held = _number(stalled["mib_per_reader"])
    found.append(_goal("MiB per stalled reader", held, f"<= {MAX_STALLED_MIB}", held <= MAX_STALLED_MIB))
    kept = _number(stalled["share_kept"])
    label = "tokens/s of others beside stalled readers, over beside reading ones"
    found.append(_goal(label, kept, f">= {MIN_SHARE_KEPT}", kept >= MIN_SHARE_KEPT))
    return found


def _goal(name: str, reached: object, limit: str, is_met: bool) -> dict[str, object]:
    return {"goal": name, "reached": reached, "limit": limit, "is_met": is_met}


def _median(values: Sequence[object]) -> object:
    mappings = [value for value in values if isinstance(value, Mapping)]
    if mappings:
        return {key: _median([mapping[key] for mapping in mappings]) for key in mappings[0]}
    if any(value is None for value in values):
        return None
    return round(statistics.median(_number(value) for value in values), 3)


def _number(value: object) -> float:
    assert isinstance(value, int | float), value
    return float(value)
