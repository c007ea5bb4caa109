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


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on with; - reads standard input.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Needed where several are served.")] = "",
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
