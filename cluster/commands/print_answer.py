"""An answer on the screen: its text as it comes, then what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import typer

from cluster.commands.status_screen import describe_cost
from cluster.replies import Delta, Final


def print_answer(events: Iterator[Delta | Final], *, as_json: bool = False) -> str:
    """Print an answer and return its text. As JSON it is one document at the end."""
    pieces: list[str] = []
    finish_reason: str | None = None
    final: Final | None = None
    for event in events:
        if isinstance(event, Final):
            final = event
            continue
        pieces.append(event.text)
        finish_reason = event.finish_reason or finish_reason
        if not as_json:
            typer.echo(event.text, nl=False)
    text = "".join(pieces)
    if as_json:
        document = {"text": text, "finish_reason": finish_reason} | (asdict(final) if final else {})
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return text
    typer.echo()
    if final:
        typer.secho(describe_cost(final), dim=True, err=True)
    return text
