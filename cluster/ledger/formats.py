"""The shapes that reports and entries leave in: CSV, JSON, the MLPerf-style schema, OpenTelemetry. Pure.

The MLPerf-style names are those of the proposal mlcommons/inference PR 2587; OTLP/JSON is
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, fields

from cluster.ledger.entries import RequestEntry, Summary
from cluster.ledger.report import MEASURED, Report, ReportRow


def report_to_json(report: Report) -> str:
    document = asdict(report) | {"by": report.by.value}
    return json.dumps(document, indent=2)


def report_to_csv(report: Report) -> str:
    """A header, then a line per row; unknown is empty, not zero."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in fields(ReportRow)]
    writer.writerow([report.by.value if name == "group" else name for name in names])
    for row in report.rows:
        writer.writerow([getattr(row, name) for name in names])
    return out.getvalue()


def requests_to_jsonl(entries: Iterable[RequestEntry]) -> Iterable[str]:
    """One JSON document per line."""
    for entry in entries:
        yield json.dumps(asdict(entry)) + "\n"


def to_mlperf(report: Report) -> str:
    """Energy of each row in MLPerf's terms. Estimates say so; a submission must not mix them in."""
    rows = [
        {
            "system_under_test": row.group,
            "energy_per_token_joules": row.joules_per_output_token,
            "total_energy_joules": row.energy_j,
            "prefill_energy_joules": row.prefill_j,
            "generation_energy_joules": row.decode_j,
            "static_energy_joules": row.static_j,
            "active_energy_joules": (
                None if row.energy_j is None or row.static_j is None else row.energy_j - row.static_j
            ),
            "idle_energy_joules": row.idle_j,
            "output_tokens": row.output_tokens,
            "input_tokens": row.prompt_tokens,
            "samples": row.num_requests,
            "measurement_method": row.source,
            "is_measured": row.source in MEASURED,
        }
        for row in report.rows
    ]
    return json.dumps({"since_s": report.since_s, "until_s": report.until_s, "results": rows}, indent=2)


def to_otlp(summary: Summary, *, since_s: float, until_s: float) -> str:
    """`wattline.energy` and `wattline.tokens` as delta sums, for a collector's OTLP/HTTP JSON receiver."""
    energy = [
        _point(
            value=sums_mj / 1e3,
            since_s=since_s,
            until_s=until_s,
            attributes={
                "gen_ai.request.model": sums.model,
                "wattline.tenant": sums.tenant,
                "wattline.energy.phase": phase,
                "wattline.energy.source": sums.source,
                "wattline.ledger": "request",
            },
        )
        for sums in summary.requests
        if sums.source
        for phase, sums_mj in (("prefill", sums.prefill_mj), ("decode", sums.decode_mj))
    ]
    energy += [
        _point(
            value=sums_mj / 1e3,
            since_s=since_s,
            until_s=until_s,
            attributes={
                "gen_ai.request.model": sums.model,
                "wattline.energy.source": sums.source,
                "wattline.ledger": ledger,
            },
        )
        for sums in summary.models
        for ledger, sums_mj in (("idle", sums.idle_mj), ("unattributed", sums.unattributed_mj))
    ]
    tokens = [
        _point(
            value=count,
            since_s=since_s,
            until_s=until_s,
            attributes={
                "gen_ai.request.model": sums.model,
                "wattline.tenant": sums.tenant,
                "gen_ai.token.type": kind,
            },
        )
        for sums in summary.requests
        for kind, count in (("input", sums.prompt_tokens), ("output", sums.output_tokens))
    ]
    metrics = [
        _metric("wattline.energy", "J", energy),
        _metric("wattline.tokens", "{token}", tokens),
    ]
    resource = {"attributes": [_attribute("service.name", "wattline")]}
    scope = {"scope": {"name": "wattline.ledger"}, "metrics": metrics}
    return json.dumps({"resourceMetrics": [{"resource": resource, "scopeMetrics": [scope]}]}, indent=2)


_DELTA = 1
"""OTLP's AGGREGATION_TEMPORALITY_DELTA."""


def _metric(name: str, unit: str, points: list[dict[str, object]]) -> dict[str, object]:
    sums = {"aggregationTemporality": _DELTA, "isMonotonic": True, "dataPoints": points}
    return {"name": name, "unit": unit, "sum": sums}


def _point(*, value: float, since_s: float, until_s: float, attributes: dict[str, str]) -> dict[str, object]:
    return {
        "startTimeUnixNano": str(round(since_s * 1e9)),
        "timeUnixNano": str(round(until_s * 1e9)),
        "asDouble": float(value),
        "attributes": [_attribute(key, text) for key, text in attributes.items()],
    }


def _attribute(key: str, text: str) -> dict[str, object]:
    return {"key": key, "value": {"stringValue": text}}
