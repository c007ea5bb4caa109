"""`wattline demo`: the whole system on this machine, asked the model cards' own example questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.command_error import CommandError
from cluster.commands.options import ENERGY_WAIT_MS, read_config

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.client import Client
    from cluster.replies import Final

PACKAGED_CONFIG = Path(__file__).resolve().parents[2] / "examples" / "demo.yaml"
MAX_TOKENS = 96

QUESTIONS = {
    "llama": (
        ("system", "You are a pirate chatbot who always responds in pirate speak!"),
        ("user", "Who are you?"),
    ),
    "granite": (
        (
            "user",
            "Please list one IBM Research laboratory located in the United States. "
            "You should only output its name and location.",
        ),
    ),
}
"""By the start of a model's name: the example of its family's model card."""
OTHER_QUESTION = (("user", "Who are you?"),)


def demo(
    file: Annotated[
        Path,
        typer.Option(
            "--file", "-f", help="The configuration.", metavar="FILE", show_default="examples/demo.yaml"
        ),
    ] = PACKAGED_CONFIG,
    once: Annotated[bool, typer.Option("--once", help="Exit after the answers.")] = False,
) -> None:
    """Start two small models, ask each a question, and show what the answers cost.

    A tensor-parallel Llama and an expert-parallel Granite MoE, two processes each, on this machine alone.
    Keeps serving until Ctrl-C.
    """
    if not file.exists():
        raise CommandError(
            f"{file} is not there; run this in the repository, or give a configuration with -f"
        )
    config = read_config(file)
    from rich.console import Console

    from cluster.commands.running import running_stack, serve_until_interrupted
    from cluster.commands.status_screen import render_answers, render_models

    console = Console()
    with running_stack(config, console) as (stack, interrupts):
        if state := stack.status():
            console.print(render_models(state))
        answers = [(section.name, _ask(stack.client, section.name, console)) for section in config.models]
        console.print()
        console.print(render_answers(answers))
        console.print()
        for model, final in answers:
            console.print(
                f"[dim]{model}: request {final.request_id}, trace {final.trace_id}[/]", highlight=False
            )
        console.print(
            f"gRPC [bold]{stack.addresses.grpc}[/]  "
            f"dashboard [bold]{config.router.scheme}://{stack.addresses.http}/dash[/]"
        )
        if not once:
            console.print("Serving. Try `wattline chat` in another terminal; Ctrl-C ends.", style="dim")
            serve_until_interrupted(stack, interrupts, console)


def _ask(client: Client, model: str, console: Console) -> Final:
    """Stream one answer to the screen."""
    from cluster.client import Ask
    from cluster.replies import Final

    messages = next(
        (question for family, question in QUESTIONS.items() if model.startswith(family)), OTHER_QUESTION
    )
    console.print()
    console.rule(f"[bold]{model}[/]", align="left", style="dim")
    for role, content in messages:
        console.print(f"[dim]{role}:[/] {content}", highlight=False)
    console.print("[dim]assistant:[/] ", end="")
    ask = Ask(temperature=0.0, max_tokens=MAX_TOKENS, energy_wait_ms=ENERGY_WAIT_MS)
    for event in client.chat(model, messages, ask):
        if isinstance(event, Final):
            console.print()
            return event
        console.print(event.text, end="", markup=False, highlight=False)
    raise CommandError(f"{model}: the answer ended without its final message")
