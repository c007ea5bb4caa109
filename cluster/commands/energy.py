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
    from cluster.config import EnergySection
    from cluster.ledger.reading import LedgerReader
    from cluster.ledger.report import Site

SPAN_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

app = typer.Typer(
    help="Reports from the ledger: joules, kWh, carbon, cost, by tenant or model.", no_args_is_help=True
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
    price: Annotated[
        float | None, typer.Option("--price-per-kwh", min=0.0, help="Instead of `energy.price_per_kwh`.")
    ] = None,
    db: Database = None,
    address: Store = "",
    file: ConfigPath = None,
) -> None:
    """Joules, kWh, g CO2e, cost and joules per token of what was served.

    J is what the requests drew, J idle what the model's devices drew for nobody, which is no tenant's. kWh
    is all joules of a row at the building's meter (times PUE), SCI the g CO2e per 1,000 output tokens.

    Measured (counter) and estimated (tdp, model_*) joules are never added up: each source has rows of its
    own.

    Example: wattline energy report --since 7d --by tenant --format csv > week.csv
    """
    from rich.console import Console

    from cluster.commands.energy_screen import render_report
    from cluster.ledger.formats import report_to_csv, report_to_json
    from cluster.ledger.report import Group, make_report

    with _reader(db, address, file) as (reader, energy):
        since_s, until_s = _span(since)
        summary = reader.summarize(since_s=since_s, until_s=until_s)
    site = _site(energy, pue=pue, carbon_g_per_kwh=carbon, price_per_kwh=price)
    made = make_report(summary, by=Group(by.value), site=site, since_s=since_s, until_s=until_s)
    match form:
        case ReportFormat.CSV:
            typer.echo(report_to_csv(made), nl=False)
        case ReportFormat.JSON:
            typer.echo(report_to_json(made))
        case ReportFormat.TABLE:
            Console().print(render_report(made))


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

    Example: wattline energy export --format otlp | curl -d @- -H 'content-type: application/json'
    http://collector:4318/v1/metrics
    """
    from cluster.ledger.formats import requests_to_jsonl, to_mlperf
    from cluster.ledger.otlp import to_otlp
    from cluster.ledger.report import Group, make_report

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
    made = make_report(summary, by=Group.MODEL, site=_site(energy), since_s=since_s, until_s=until_s)
    typer.echo(to_mlperf(made))


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


def _site(
    energy: EnergySection,
    *,
    pue: float | None = None,
    carbon_g_per_kwh: float | None = None,
    price_per_kwh: float | None = None,
) -> Site:
    """What the configuration says, but for what is given."""
    from cluster.ledger.report import Site

    return Site(
        pue=energy.pue if pue is None else pue,
        carbon_g_per_kwh=energy.carbon_g_per_kwh if carbon_g_per_kwh is None else carbon_g_per_kwh,
        price_per_kwh=energy.price_per_kwh if price_per_kwh is None else price_per_kwh,
        currency=energy.currency,
    )


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
