"""`wattline key`: make API keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

MAX_DAYS = 36_500

app = typer.Typer(no_args_is_help=True, help="Make API keys.")


@app.callback()
def key() -> None:
    """Make API keys."""


@app.command()
def new(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.", metavar="TENANT")],
    label: Annotated[str, typer.Option(help="A word to tell it from the tenant's others.")] = "",
    days: Annotated[int, typer.Option(min=0, max=MAX_DAYS, help="Days it holds; 0: it does not expire.")] = 0,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Append its line to this file.", metavar="FILE")
    ] = None,
) -> None:
    """Make a key and show it this once.

    The key goes to standard output; its line for `router.auth.keys_file`, which holds only a hash, goes to
    standard error or to --file. Running routers see the line within a second.
    """
    from datetime import UTC, datetime, timedelta

    from cluster.command_error import CommandError
    from cluster.security.api_keys import make_key

    expires_on = datetime.now(UTC).date() + timedelta(days=days) if days else None
    text, made = make_key(tenant, label=label, expires_on=expires_on)
    if file is None:
        typer.echo(f"Add this line to the file of router.auth.keys_file:\n{made.line}", err=True)
        typer.echo(f"The key of {tenant}; it is shown this once:", err=True)
    else:
        try:
            _append(file, made.line)
        except OSError as error:
            raise CommandError(f"{file} cannot be written ({error.strerror}); choose another file") from error
        typer.echo(f"Key {made.key_id} of {tenant} is in {file}; this is shown once:", err=True)
    typer.echo(text)


def _append(file: Path, line: str) -> None:
    """On a line of its own, also where somebody's editor left the last one open."""
    is_new = not file.exists()
    with file.open("ab+") as keys:
        if keys.tell():
            keys.seek(-1, os.SEEK_END)
        end = b"" if keys.read() in (b"", b"\n") else b"\n"
        keys.write(end + line.encode() + b"\n")
    if is_new:
        file.chmod(0o600)
