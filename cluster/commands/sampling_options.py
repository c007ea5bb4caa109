"""How an answer is drawn, as options of `generate` and `chat`. The server checks their ranges."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from cluster.command_error import CommandError
from cluster.commands.options import MAX_UINT32

MAX_UINT64 = 2**64 - 1

Temperature = Annotated[
    float, typer.Option("--temperature", "-t", min=0.0, help="0 always takes the likeliest token.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, max=MAX_UINT64, help="Same seed and prompt, same answer.")
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Draw from the likeliest tokens that sum to this.")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", min=0, max=MAX_UINT32, help="Draw from this many of the likeliest.")
]
MinP = Annotated[
    float | None, typer.Option("--min-p", help="Drop tokens below this part of the likeliest one.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1: say again less, the prompt included.")
]
PresencePenalty = Annotated[
    float | None, typer.Option("--presence-penalty", help="Above 0: say again less, of the answer alone.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option("--frequency-penalty", help="The same, for each time that it was said.")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option("--logit-bias", metavar="TOKEN=BIAS", help="Favour a token id (-100 to 100); may repeat."),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        "--logprobs", min=0, max=MAX_UINT32, help="Of each token and this many beside it; shown by --json."
    ),
]
Choices = Annotated[int | None, typer.Option("--choices", min=1, help="Answers to one prompt, up to 8.")]


def parse_logit_bias(pairs: Iterable[str]) -> dict[int, float]:
    """`TOKEN=BIAS` pairs. Raises CommandError."""
    biases: dict[int, float] = {}
    for pair in pairs:
        token, _, bias = pair.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise CommandError(f"--logit-bias {pair!r}: give TOKEN=BIAS, e.g. 42=-100") from None
        if not 0 <= int(token) <= MAX_UINT32:
            raise CommandError(f"--logit-bias {pair!r}: a token id is 0 to {MAX_UINT32}")
    return biases
