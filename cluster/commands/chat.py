"""`wattline chat`: one answer, or a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
    dial_router,
    pick_model,
)
from cluster.commands.sampling_options import (
    Choices,
    FrequencyPenalty,
    LogitBias,
    Logprobs,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    parse_logit_bias,
)

if TYPE_CHECKING:
    from cluster.client import Ask, Client

MAX_HISTORY = 200
"""Messages a conversation remembers; the oldest answers are dropped first."""


def chat(
    message: Annotated[str, typer.Argument(help="What to say; nothing starts a conversation.")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="Needed where several are served.")] = "",
    system: Annotated[str, typer.Option("--system", "-s", help="How the model shall behave.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    logit_bias: LogitBias = None,
    logprobs: Logprobs = None,
    choices: Choices = None,
    seed: Seed = None,
    as_json: Json = False,
    address: Address = "",
    ca: Ca = "",
    cert: Cert = "",
    api_key: ApiKey = "",
) -> None:
    """Talk to a model and see what every answer cost.

    In a conversation, /new forgets it and Ctrl-D ends it.
    """
    from cluster.client import Ask
    from cluster.commands.print_answer import print_answer

    if not message and (choices or 1) > 1:
        raise CommandError("a conversation goes on from one answer; give a message, or leave out --choices")
    ask = Ask(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=parse_logit_bias(logit_bias or ()),
        logprobs=logprobs,
        num_choices=choices,
        seed=seed,
        max_tokens=max_tokens,
        energy_wait_ms=ENERGY_WAIT_MS,
    )
    opening = [("system", system)] if system else []
    with dial_router(address, ca=ca, cert=cert, api_key=api_key) as client:
        name = pick_model([card.name for card in client.list_models()], model)
        if message:
            print_answer(client.chat(name, [*opening, ("user", message)], ask), as_json=as_json)
            return
        _converse(client, name, opening, ask)


def _converse(client: Client, model: str, opening: list[tuple[str, str]], ask: Ask) -> None:
    from cluster.client import CallError
    from cluster.commands.print_answer import print_answer

    typer.secho(f"Talking to {model}; /new forgets, Ctrl-D ends.", dim=True, err=True)
    history: list[tuple[str, str]] = []
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if said == "/new":
            history.clear()
            continue
        if not said:
            continue
        try:
            answer = print_answer(client.chat(model, [*opening, *history, ("user", said)], ask))
        except KeyboardInterrupt:
            typer.secho("\n(stopped)", dim=True, err=True)
            continue
        except CallError as error:
            typer.secho(f"{error.code}: {error}", fg="red", err=True)
            continue
        history = [*history, ("user", said), ("assistant", answer)][-MAX_HISTORY:]
