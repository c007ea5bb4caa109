"""`wattline energy report` and `wattline energy export`: what was spent, and on whom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.command_error import CommandError

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.config import EnergySection
    from cluster.ledger.reading import LedgerReader
    from cluster.ledger.report import Report

SPAN_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

app = typer.Typer(
    help="Reports from the ledger: joules, kWh, carbon, by tenant or model.", no_args_is_help=True
)


class By(Enum):
    TENANT = "tenant"
    MODEL = "model"


class ReportFormat(Enum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"


class ExportFormat(Enum):
    JSONL = "jsonl"
    MLPERF = "mlperf"
    OTLP = "otlp"


Since = Annotated[
    str, typer.Option("--since", metavar="SPAN", help="How far back: 90s, 15m, 1h, 7d, 4w, or all.")
]
Database = Annotated[
    Path | None,
    typer.Option("--db", metavar="FILE", help="A ledger file. Default: the one of `wattline up` here."),
]
Store = Annotated[
    str, typer.Option("--address", "-a", metavar="HOST:PORT", help="A running `wattline ledger` instead.")
]
ConfigPath = Annotated[
    Path | None,
    typer.Option("--file", "-f", metavar="FILE", help="Where PUE, carbon and the ledger's path come from."),
]


@app.command()
def report(
    since: Since = "1h",
    by: Annotated[By, typer.Option(help="Rows of the report.")] = By.MODEL,
    form: Annotated[ReportFormat, typer.Option("--format", help="How to print it.")] = ReportFormat.TABLE,
    pue: Annotated[float | None, typer.Option(min=1.0, max=10.0, help="Instead of `energy.pue`.")] = None,
    carbon: Annotated[
        float | None,
        typer.Option("--carbon-g-per-kwh", min=0.0, help="Instead of `energy.carbon_g_per_kwh`."),
    ] = None,
    db: Database = None,
    address: Store = "",
    file: ConfigPath = None,
) -> None:
    """Joules, kWh, g CO2e and joules per token of what was served.

    Measured and estimated joules are never added up: each has rows of its own.
    """
    from rich.console import Console

    from cluster.ledger.formats import report_to_csv, report_to_json
    from cluster.ledger.report import Group, Site, make_report

    with _reader(db, address, file) as (reader, energy):
        since_s, until_s = _span(since)
        summary = reader.summarize(since_s=since_s, until_s=until_s)
    site = Site(
        pue=energy.pue if pue is None else pue,
        carbon_g_per_kwh=energy.carbon_g_per_kwh if carbon is None else carbon,
    )
    made = make_report(summary, by=Group(by.value), site=site, since_s=since_s, until_s=until_s)
    match form:
        case ReportFormat.CSV:
            typer.echo(report_to_csv(made), nl=False)
        case ReportFormat.JSON:
            typer.echo(report_to_json(made))
        case ReportFormat.TABLE:
            Console().print(_render(made))


@app.command()
def export(
    since: Since = "1h",
    form: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = ExportFormat.JSONL,
    db: Database = None,
    address: Store = "",
    file: ConfigPath = None,
) -> None:
    """Write the ledger for other tools: requests one by one, MLPerf-style results, or OTLP metrics.

    jsonl: a request per line. mlperf: energy per model. otlp: for a collector's OTLP/HTTP JSON receiver.
    """
    from cluster.ledger.formats import requests_to_jsonl, to_mlperf, to_otlp
    from cluster.ledger.report import Group, Site, make_report

    with _reader(db, address, file) as (reader, energy):
        since_s, until_s = _span(since)
        if form is ExportFormat.JSONL:
            for line in requests_to_jsonl(reader.list_requests(since_s=since_s, until_s=until_s)):
                typer.echo(line, nl=False)
            return
        summary = reader.summarize(since_s=since_s, until_s=until_s)
    if form is ExportFormat.OTLP:
        typer.echo(to_otlp(summary, since_s=since_s, until_s=until_s))
        return
    site = Site(pue=energy.pue, carbon_g_per_kwh=energy.carbon_g_per_kwh)
    typer.echo(to_mlperf(make_report(summary, by=Group.MODEL, site=site, since_s=since_s, until_s=until_s)))


@contextmanager
def _reader(db: Path | None, address: str, file: Path | None) -> Iterator[tuple[LedgerReader, EnergySection]]:
    from cluster.config import EnergySection, default_runtime_dir, load_config
    from cluster.ledger.location import ledger_path
    from cluster.ledger.reading import open_reader

    config = load_config(file) if file else None
    path = db or (ledger_path(config) if config else default_runtime_dir() / "ledger.db")
    reader = open_reader(address=address, path=path)
    try:
        yield reader, config.energy if config else EnergySection()
    finally:
        reader.close()


def _span(text: str) -> tuple[float, float]:
    """(since, until) in seconds since 1970. Raises CommandError."""
    import time

    now_s = time.time()
    if text == "all":
        return 0.0, now_s
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise CommandError(f"--since: got {text!r}; allowed: 90s, 15m, 1h, 7d, 4w, or all")
    return max(0.0, now_s - float(match[1]) * SPAN_S[match[2]]), now_s


def _render(report: Report) -> object:
    """What was served, what it took, and how much of that was measured: tables that fit eighty columns."""
    from rich.console import Group as Lines
    from rich.text import Text

    if not report.rows:
        return Text("nothing was served in this time; --since all looks at everything that is kept")
    carbon = report.site.carbon_g_per_kwh
    served = _table(report, ("requests", "tokens in", "out", "J/out", "J/token"))
    taken = _table(report, ("J", "J idle", "kWh", *(() if carbon is None else ("g CO2e", "SCI g/1k"))))
    for row in report.rows:
        name = (row.group, row.source)
        tokens = (f"{row.prompt_tokens:,}", f"{row.output_tokens:,}")
        ratios = (_figure(row.joules_per_output_token, "g"), _figure(row.joules_per_token, "g"))
        served.add_row(*name, f"{row.num_requests:,}", *tokens, *ratios)
        grams = (_figure(row.carbon_g, "g"), _figure(row.sci_g_per_1000_tokens, "g"))
        joules = (_figure(row.energy_j, "f"), _figure(row.idle_j, "f"), _figure(row.kwh, "g"))
        taken.add_row(*name, *joules, *(() if carbon is None else grams))
    notes = [f"PUE {report.site.pue:g}"]
    notes.append(f"{carbon:g} g CO2e/kWh" if carbon is not None else "no carbon: set energy.carbon_g_per_kwh")
    lines = ["; ".join(notes)]
    if known := report.coverage:
        lines.append(
            f"output tokens: {known.measured:.0%} measured, {known.estimated:.0%} estimated, "
            f"{known.unknown:.0%} unknown"
        )
    return Lines(served, Text(""), taken, Text(""), *(Text(line, style="dim") for line in lines))


def _table(report: Report, columns: tuple[str, ...]) -> Table:
    from cluster.commands.status_screen import new_table

    return new_table(report.by.value, "source", *(f">{column}" for column in columns))


def _figure(value: float | None, kind: str) -> str:
    """Joules with a decimal, the rest with three digits; a dash where nothing is known."""
    if value is None:
        return "-"
    return f"{value:,.1f}" if kind == "f" else f"{value:,.3g}"
