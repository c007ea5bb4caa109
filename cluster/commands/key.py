"""`wattline key`: make API keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make API keys.")


@app.callback()
def key() -> None:
    """Make API keys."""


@app.command()
def new(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.", metavar="TENANT")],
    label: Annotated[str, typer.Option(help="A word to tell it from the tenant's others.")] = "",
    days: Annotated[int, typer.Option(min=0, help="Days it holds; 0: it does not expire.")] = 0,
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
            is_new = not file.exists()
            with file.open("a", encoding="utf-8") as keys:
                keys.write(f"{made.line}\n")
            if is_new:
                file.chmod(0o600)
        except OSError as error:
            raise CommandError(f"{file} cannot be written ({error.strerror}); choose another file") from error
        typer.echo(f"Key {made.key_id} of {tenant} is in {file}; this is shown once:", err=True)
    typer.echo(text)
