"""A report of joules for a person: what was served, what it drew, and what that means at the building."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group as Screen
from rich.table import Table
from rich.text import Text

from cluster.commands.status_screen import new_table, show_number
from cluster.ledger.report import Group, Report, ReportRow, Site

Column = tuple[str, Callable[[ReportRow], str]]


def render_report(report: Report) -> Screen | Text:
    """Tables that fit eighty columns, and a line for each thing that a reader has to know of them."""
    if not report.rows:
        return Text("nothing was served in this time; --since all looks at everything that is kept")
    tables = [_table(report, columns) for columns in (_SERVED, _joules(report), _meanings(report.site))]
    parts = [part for table in tables for part in (table, Text(""))]
    return Screen(*parts, *(Text(line, style="dim") for line in _notes(report)))


_SERVED: tuple[Column, ...] = (
    ("requests", lambda row: f"{row.num_requests:,}"),
    ("tokens in", lambda row: f"{row.prompt_tokens:,}"),
    ("out", lambda row: f"{row.output_tokens:,}"),
    ("J/out", lambda row: show_number(row.joules_per_output_token)),
    ("J/token", lambda row: show_number(row.joules_per_token)),
)


def _joules(report: Report) -> tuple[Column, ...]:
    """Idle and unbilled ones where they are somebody's, those of the hosts where any are known."""
    has_idle = report.by is Group.MODEL
    columns: tuple[Column, ...] = (("J", lambda row: _tenths(row.energy_j)),)
    if has_idle:
        columns += (("J idle", lambda row: _tenths(row.idle_j)),)
    if any(row.unbilled_j for row in report.rows):
        columns += (("J unbilled", lambda row: _tenths(row.unbilled_j)),)
    if any(row.host_j is not None or row.host_rest_j is not None for row in report.rows):
        columns += (("J host", lambda row: _tenths(row.host_j)),)
        if has_idle:
            columns += (("J host idle", lambda row: _tenths(row.host_rest_j)),)
    return columns


def _meanings(site: Site) -> tuple[Column, ...]:
    columns: tuple[Column, ...] = (("kWh", lambda row: show_number(row.kwh)),)
    if site.carbon_g_per_kwh is not None:
        columns += (
            ("g CO2e", lambda row: show_number(row.carbon_g)),
            ("SCI g/1k", lambda row: show_number(row.sci_g_per_1000_tokens)),
        )
    if site.price_per_kwh is not None:
        columns += ((f"cost {site.currency}".rstrip(), lambda row: _money(row.cost)),)
    return columns


def _table(report: Report, columns: tuple[Column, ...]) -> Table:
    table = new_table(report.by.value, "source", *(f">{title}" for title, _ in columns))
    for row in report.rows:
        table.add_row(row.group, row.source, *(show(row) for _, show in columns))
    return table


def _notes(report: Report) -> list[str]:
    site = report.site
    notes = [f"kWh at the building's meter, PUE {site.pue:g}"]
    if site.carbon_g_per_kwh is None:
        notes.append("no carbon: set energy.carbon_g_per_kwh")
    else:
        notes.append(f"{site.carbon_g_per_kwh:g} g CO2e/kWh")
    if site.price_per_kwh is None:
        notes.append("no cost: set energy.price_per_kwh")
    else:
        notes.append(f"{site.price_per_kwh:g} {site.currency}".rstrip() + "/kWh")
    lines = ["; ".join(notes)]
    if report.by is Group.TENANT:
        lines.append("idle joules are no tenant's: they are not in here; --by model has them")
    if known := report.coverage:
        lines.append(
            f"output tokens: {known.measured:.0%} measured, {known.estimated:.0%} estimated, "
            f"{known.unknown:.0%} unknown"
        )
    num_requests = sum(row.num_requests for row in report.rows)
    num_host = sum(row.num_host_requests for row in report.rows)
    if 0 < num_host < num_requests:
        lines.append(f"J host: of {num_host:,} of {num_requests:,} requests; of the others it is unknown")
    if any(row.unbilled_j for row in report.rows):
        lines.append(
            "J unbilled: of requests still open or lost with a router; below 0: of bills from before"
        )
    return lines


def _tenths(value: float | None) -> str:
    """A dash where nothing is known."""
    return "-" if value is None else f"{value:,.1f}"


def _money(value: float | None) -> str:
    """With cents from one on; below, what is left of it."""
    return show_number(value) if value is None or value < 1.0 else f"{value:,.2f}"
