"""An answer on the screen: its text as it comes, then what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import typer

from cluster.commands.status_screen import describe_cost
from cluster.replies import Delta, Final, TokenLogprobs


@dataclass(slots=True, kw_only=True)
class Choice:
    """One answer as far as it came."""

    text: str = ""
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs

    def document(self) -> dict[str, Any]:
        said = {"logprobs": self._logprobs_document()} if self.logprobs else {}
        return {"text": self.text, "finish_reason": self.finish_reason} | said

    def _logprobs_document(self) -> list[dict[str, Any]]:
        return [
            {"token_id": token_id, "logprob": said.logprob, "top": [list(pair) for pair in said.top]}
            for token_id, said in zip(self.token_ids, self.logprobs, strict=True)
        ]


def print_answer(events: Iterator[Delta | Final], *, as_json: bool = False) -> str:
    """Print an answer and return its text. As JSON it is one document at the end.

    The first of several choices is printed as it comes, the others behind it.
    """
    choices: list[Choice] = [Choice()]
    final: Final | None = None
    for event in events:
        if isinstance(event, Final):
            final = event
            continue
        while len(choices) <= event.index:
            choices.append(Choice())
        choices[event.index].add(event)
        if not as_json and event.index == 0:
            typer.echo(event.text, nl=False)
    if as_json:
        typer.echo(json.dumps(_document(choices, final), indent=2, ensure_ascii=False))
        return choices[0].text
    typer.echo()
    for index, choice in enumerate(choices[1:], start=2):
        typer.secho(f"--- choice {index} of {len(choices)} ---", dim=True, err=True)
        typer.echo(choice.text)
    if final:
        typer.secho(describe_cost(final), dim=True, err=True)
    return choices[0].text


def _document(choices: list[Choice], final: Final | None) -> dict[str, Any]:
    """`choices` only where there are several: a script that asks for one finds it where it always was."""
    several = {"choices": [choice.document() for choice in choices]} if len(choices) > 1 else {}
    return choices[0].document() | several | (asdict(final) if final else {})
