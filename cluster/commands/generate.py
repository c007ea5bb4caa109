"""`wattline generate`: complete a text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.command_error import CommandError
from cluster.commands.options import (
    ENERGY_WAIT_MS,
    Address,
    ApiKey,
    Ca,
    Cert,
    Json,
    MaxTokens,
    Seed,
    Temperature,
    dial_router,
    pick_model,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on with; - reads standard input.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Needed where several are served.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may repeat.")
    ] = None,
    as_json: Json = False,
    address: Address = "",
    ca: Ca = "",
    cert: Cert = "",
    api_key: ApiKey = "",
) -> None:
    """Complete a text and say what it cost.

    The answer goes to standard output as it comes, its cost to standard error.
    """
    from cluster.client import Ask
    from cluster.commands.print_answer import print_answer

    text = _read_input() if prompt == "-" else prompt
    ask = Ask(
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        energy_wait_ms=ENERGY_WAIT_MS,
    )
    with dial_router(address, ca=ca, cert=cert, api_key=api_key) as client:
        name = pick_model([card.name for card in client.list_models()], model)
        print_answer(client.generate(name, text, ask), as_json=as_json)


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise CommandError("standard input is not valid UTF-8; convert it, e.g. with `iconv`") from error
