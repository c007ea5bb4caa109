"""`wattline meters`: what this host can measure, how right it is, and why not more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from cluster.commands.options import Json

CHOICE = (
    "energy.meter: auto reads nvml for replicas on GPUs and estimates by cpu-model for those on CPUs; the "
    "others are taken by name."
)

if TYPE_CHECKING:
    from rich.table import Table

    from replicas.energy.survey import FoundMeter


def meters(as_json: Json = False) -> None:
    """Show every energy meter of this host, how right it is, and why not more.

    Needs neither a running agent nor anything up. The name of a meter is what `energy.meter` takes.
    """
    import json
    from dataclasses import asdict

    from rich.console import Console

    from replicas.energy.survey import survey_meters

    found = survey_meters()
    if as_json:
        rows = [asdict(one) | {"confidence_factor": one.confidence_factor} for one in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    console = Console()
    console.print(render_meters(found))
    console.print(f"\n{CHOICE}", style="dim", highlight=False)


def render_meters(found: list[FoundMeter]) -> Table:
    """One row per device, the reason in place of its name where it cannot be read."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("meter", "device", "source", "accuracy", "what it is, or why not"):
        table.add_column(title, overflow="fold")
    for one in found:
        accuracy = describe_accuracy(one.confidence_factor) if one.is_available else "cannot be read"
        style = "" if one.is_available else "dim"
        cells = (one.name, one.device or "-", one.source.value, accuracy, one.detail)
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def describe_accuracy(factor: float) -> str:
    """In words: within 5 %, or within a factor of 2."""
    return f"within {factor - 1:.0%}" if factor < 1.5 else f"within a factor of {factor:g}"
