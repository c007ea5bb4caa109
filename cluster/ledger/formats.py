"""The shapes that reports and entries leave in: CSV, JSON, the MLPerf-style schema. Pure.

The MLPerf-style names are those of the proposal mlcommons/inference PR 2587. OpenTelemetry: `otlp.py`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, fields

from cluster.ledger.entries import RequestEntry
from cluster.ledger.report import Report, ReportRow
from replicas.energy.meter import MEASURED


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
            "host_energy_joules": row.host_j,
            "output_tokens": row.output_tokens,
            "input_tokens": row.prompt_tokens,
            "samples": row.num_requests,
            "measurement_method": row.source,
            "is_measured": row.source in MEASURED,
        }
        for row in report.rows
    ]
    return json.dumps({"since_s": report.since_s, "until_s": report.until_s, "results": rows}, indent=2)
