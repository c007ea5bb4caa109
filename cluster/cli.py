"""`wattline`: the command line. Imports nothing slow, so that `--help` answers at once."""

from __future__ import annotations

import sys
from importlib.metadata import version as package_version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.command_error import CommandError
from cluster.commands.agent import PASS_THROUGH, agent
from cluster.commands.chat import chat
from cluster.commands.demo import demo
from cluster.commands.down import down
from cluster.commands.energy import app as energy
from cluster.commands.generate import generate
from cluster.commands.key import app as key_app
from cluster.commands.ledger import ledger
from cluster.commands.meters import meters
from cluster.commands.monitoring import monitoring
from cluster.commands.roll import roll
from cluster.commands.router import router
from cluster.commands.status import status
from cluster.commands.top import top
from cluster.commands.up import up
from cluster.commands.why import why

EXAMPLES = """\
 Examples
   # two small models on this machine, no GPU needed
   wattline demo

   # your own configuration, then a question
   wattline up -f wattline.yaml --detach
   wattline chat -m llama-demo "Who are you?"
   wattline chat -m llama-demo                 a conversation

   # what runs, how fast, at how many joules per token
   wattline status --watch
   wattline top                                the dashboard, in this terminal
   wattline generate "Once upon a time" -m llama-demo --json | jq .energy
   wattline why REQUEST_ID                     what happened to a request, and why
   wattline energy report --since 1h --by tenant

   wattline down
"""


class TeachingGroup(TyperGroup):
    """A command group whose help ends with examples, line by line as they are typed."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # Typer keeps these two types to itself.
        super().format_help(ctx, formatter)
        typer.echo(EXAMPLES)


app = typer.Typer(
    name="wattline",
    cls=TeachingGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve large language models on a Ray cluster, and know what every token cost in joules.",
)


def flow(doc: str) -> str:
    """A docstring with one line per paragraph: Typer would keep the breaks of the source."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in doc.split("\n\n"))


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wattline {package_version('wattline')}")
        raise typer.Exit


@app.callback()
def wattline(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of `wattline` itself."""


for command in (demo, up, down, status, top, why, chat, generate, router, roll, ledger, meters, monitoring):
    app.command()(command)
app.command(context_settings=PASS_THROUGH)(agent)
for commands in (app, key_app, energy):
    for info in commands.registered_commands:
        info.help = flow(info.callback.__doc__ or "") if info.callback else None
app.add_typer(key_app, name="key")
app.add_typer(energy, name="energy")


def main() -> None:
    """Run a command. What the user can act on is a sentence and exit code 1; Typer's own refusals give 2."""
    try:
        app()
    except BrokenPipeError:
        sys.exit(1)
    except (CommandError, ValueError) as error:
        if not is_for_the_user(error):
            raise
        typer.secho(f"wattline: {error}", fg="red", err=True)
        sys.exit(1)


def is_for_the_user(error: Exception) -> bool:
    """Is its text a sentence that says what to do? A wrong configuration's is."""
    from cluster.config import ConfigError

    return isinstance(error, CommandError | ConfigError)


if __name__ == "__main__":
    main()
