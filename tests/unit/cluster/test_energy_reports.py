"""Reports are arithmetic over the ledger's sums; sources stay apart, unknown is not zero."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.energy_screen import render_report
from cluster.ledger.database import Database, LedgerFileError
from cluster.ledger.entries import ModelSums, RequestSums, Summary
from cluster.ledger.formats import report_to_csv, to_mlperf
from cluster.ledger.otlp import to_otlp
from cluster.ledger.report import Group, Site, make_report
from tests.ledger_entries import make_entry


def sums(
    tenant: str, model: str, source: str, *, output_tokens: int, energy_mj: int, host_mj: int | None = None
) -> RequestSums:
    return RequestSums(
        tenant=tenant,
        model=model,
        source=source,
        num_requests=2,
        prompt_tokens=output_tokens,
        cached_tokens=0,
        output_tokens=output_tokens,
        wasted_tokens=0,
        prefill_mj=energy_mj // 4,
        decode_mj=energy_mj - energy_mj // 4,
        static_mj=energy_mj // 2,
        wasted_mj=0,
        num_final=2,
        host_mj=host_mj or 0,
        num_host=0 if host_mj is None else 2,
        worst_confidence_factor=1.05 if source else 0.0,
    )


SUMMARY = Summary(
    requests=(
        sums("a", "m", "counter", output_tokens=1000, energy_mj=1_800_000),
        sums("b", "m", "counter", output_tokens=500, energy_mj=900_000),
        sums("b", "m", "tdp", output_tokens=300, energy_mj=600_000),
        sums("b", "n", "", output_tokens=200, energy_mj=0),
    ),
    models=(
        ModelSums(
            model="m",
            source="counter",
            meter_mj=3_600_000,
            request_mj=2_700_000,
            idle_mj=800_000,
            unattributed_mj=100_000,
        ),
    ),
)
SITE = Site(pue=1.5, carbon_g_per_kwh=400.0)


def test_a_model_pays_for_its_idle_time_and_the_building() -> None:
    report = make_report(SUMMARY, by=Group.MODEL, site=SITE, since_s=0.0, until_s=60.0)
    rows = {(row.group, row.source): row for row in report.rows}
    measured = rows["m", "counter"]
    assert measured.energy_j == 2700.0
    assert measured.idle_j == 900.0
    assert measured.joules_per_output_token == 1.8
    assert measured.joules_per_token == 0.9
    assert measured.kwh == 0.0015
    assert measured.carbon_g == pytest.approx(0.6)
    assert measured.sci_g_per_1000_tokens == pytest.approx(0.4)
    assert rows["m", "tdp"].energy_j == 600.0


def test_what_is_on_no_bill_is_in_the_kwh_and_said() -> None:
    """A router was killed with requests under way: their joules were metered, and nobody told the store."""
    bills, meters = (sums("a", "m", "counter", output_tokens=10, energy_mj=2_000_000),), SUMMARY.models
    summary = Summary(requests=bills, models=meters)
    report = make_report(summary, by=Group.MODEL, site=SITE, since_s=0.0, until_s=60.0)
    (row,) = report.rows
    assert (row.energy_j, row.unbilled_j, row.idle_j) == (2000.0, 700.0, 900.0), "together the meter's 3600"
    assert row.kwh == pytest.approx(3600 * 1.5 / 3.6e6)
    out = io.StringIO()
    Console(file=out, width=80).print(render_report(report))
    assert "J unbilled" in out.getvalue() and "700.0" in out.getvalue()
    earlier = Summary(
        requests=(sums("a", "m", "counter", output_tokens=10, energy_mj=3_000_000),), models=meters
    )
    (row,) = make_report(earlier, by=Group.MODEL, site=SITE, since_s=0.0, until_s=60.0).rows
    assert [row.unbilled_j, row.kwh] == pytest.approx([-300.0, 3600 * 1.5 / 3.6e6])
    (tenant,) = make_report(summary, by=Group.TENANT, site=SITE, since_s=0.0, until_s=60.0).rows
    assert tenant.unbilled_j is None
    assert tenant.kwh == pytest.approx(2000 * 1.5 / 3.6e6)


def test_unknown_joules_are_no_joules_at_all() -> None:
    report = make_report(SUMMARY, by=Group.MODEL, site=SITE, since_s=0.0, until_s=60.0)
    (unknown,) = [row for row in report.rows if row.group == "n"]
    assert unknown.source == "unknown"
    assert unknown.energy_j is unknown.kwh is unknown.carbon_g is unknown.joules_per_output_token is None
    assert report.coverage is not None
    assert (report.coverage.measured, report.coverage.estimated, report.coverage.unknown) == (0.75, 0.15, 0.1)


def test_made_up_joules_cover_nothing() -> None:
    made_up = sums("a", "m", "fake", output_tokens=300, energy_mj=900_000)
    summary = replace(SUMMARY, requests=(made_up, sums("b", "m", "tdp", output_tokens=100, energy_mj=1000)))
    coverage = make_report(summary, by=Group.MODEL, site=SITE, since_s=0.0, until_s=60.0).coverage
    assert coverage is not None
    assert (coverage.measured, coverage.estimated, coverage.unknown) == (0.0, 0.25, 0.75)


def test_idle_energy_is_no_tenants() -> None:
    report = make_report(SUMMARY, by=Group.TENANT, site=SITE, since_s=0.0, until_s=60.0)
    assert [(row.group, row.source) for row in report.rows] == [
        ("a", "counter"),
        ("b", "counter"),
        ("b", "tdp"),
        ("b", "unknown"),
    ]
    assert all(row.idle_j is None for row in report.rows)


WITH_HOST = Summary(
    requests=(
        sums("a", "m", "counter", output_tokens=1000, energy_mj=1_800_000, host_mj=600_000),
        sums("b", "m", "counter", output_tokens=500, energy_mj=900_000),
    ),
    models=(replace(SUMMARY.models[0], host_meter_mj=800_000, host_request_mj=600_000),),
)


def test_the_host_stands_beside_the_devices_and_is_in_the_buildings_kwh() -> None:
    (row,) = make_report(WITH_HOST, by=Group.MODEL, site=SITE, since_s=0.0, until_s=60.0).rows
    assert (row.energy_j, row.idle_j, row.host_j, row.host_rest_j) == (2700.0, 900.0, 600.0, 200.0)
    assert (row.joules_per_output_token, row.num_host_requests) == (1.8, 2)
    assert row.kwh == pytest.approx((2700 + 900 + 600 + 200) * 1.5 / 3.6e6)
    message = json_format.Parse(to_otlp(WITH_HOST, since_s=0.0, until_s=1.0), ExportMetricsServiceRequest())
    *_, host = message.resource_metrics[0].scope_metrics[0].metrics
    assert host.name == "wattline.host_energy"
    assert [point.as_double for point in host.sum.data_points] == [600.0, 200.0]


def test_a_tenant_has_a_cost_where_a_price_is_set() -> None:
    site = replace(SITE, price_per_kwh=1200.0, currency="EUR")
    report = make_report(WITH_HOST, by=Group.TENANT, site=site, since_s=0.0, until_s=60.0)
    assert {row.group: row.cost for row in report.rows} == pytest.approx({"a": 1.2, "b": 0.45})
    assert {row.group: row.host_j for row in report.rows} == {"a": 600.0, "b": None}
    out = io.StringIO()
    Console(file=out, width=80).print(render_report(report))
    shown = out.getvalue()
    assert "cost EUR" in shown and "1.20" in shown and "1200 EUR/kWh" in shown
    assert "J host: of 2 of 4 requests" in shown
    assert "J idle" not in shown and "idle joules are no tenant's" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_without_a_price_there_is_no_cost() -> None:
    report = make_report(SUMMARY, by=Group.TENANT, site=SITE, since_s=0.0, until_s=60.0)
    assert all(row.cost is None for row in report.rows)


def test_csv_leaves_unknown_empty() -> None:
    report = make_report(SUMMARY, by=Group.MODEL, site=SITE, since_s=0.0, until_s=60.0)
    rows = list(csv.DictReader(io.StringIO(report_to_csv(report))))
    assert {row["model"]: row["energy_j"] for row in rows if row["source"] == "unknown"} == {"n": ""}


def test_mlperf_results_say_what_was_measured() -> None:
    report = make_report(SUMMARY, by=Group.MODEL, site=SITE, since_s=0.0, until_s=60.0)
    results = json.loads(to_mlperf(report))["results"]
    assert {row["measurement_method"]: row["is_measured"] for row in results} == {
        "counter": True,
        "tdp": False,
        "unknown": False,
    }
    (measured,) = [row for row in results if row["is_measured"]]
    assert measured["static_energy_joules"] + measured["active_energy_joules"] == 2700.0


def test_a_collector_can_read_the_otlp_export() -> None:
    message = json_format.Parse(to_otlp(SUMMARY, since_s=10.0, until_s=20.0), ExportMetricsServiceRequest())
    energy, tokens = message.resource_metrics[0].scope_metrics[0].metrics
    assert sum(point.as_double for point in energy.sum.data_points) == pytest.approx(4200.0)
    assert sum(point.as_double for point in tokens.sum.data_points) == 4000.0
    assert {point.start_time_unix_nano for point in energy.sum.data_points} == {10_000_000_000}


def test_the_command_reads_the_file_of_a_store(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    database = Database(path)
    database.record([make_entry()], [])
    run = CliRunner().invoke
    table = run(app, ["energy", "report", "--since", "all", "--by", "tenant", "--db", str(path)])
    assert table.exit_code == 0
    assert "acme" in table.output
    assert "100% measured" in table.output
    lines = run(app, ["energy", "export", "--since", "all", "--db", str(path)]).output.splitlines()
    assert json.loads(lines[0])["energy"]["decode_mj"] == 3000
    document = json.loads(
        run(app, ["energy", "report", "--since", "1h", "--format", "json", "--db", str(path)]).output
    )
    assert document["rows"] == []
    database.close()


def test_a_file_that_is_no_ledger_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("these are notes, and long enough to be read as a header of a database file")
    with pytest.raises(LedgerFileError, match=r"notes\.db: cannot be used as a ledger"):
        Database(path)
