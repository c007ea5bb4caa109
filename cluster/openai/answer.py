"""The answer to one OpenAI request, whole or as events: its prompts and choices by way of `Streams.run`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from time import time
from typing import Any, TypeAlias

from cluster.openai.asks import Ask
from cluster.openai.choice_text import ChoiceText
from cluster.openai.exchange import Exchange
from cluster.openai.figures import Figures, figures_of
from cluster.openai.shapes import Shape
from cluster.request.answer import Completed, TextDelta
from cluster.request.completion import Completion, TextPrompt, TokenPrompt
from cluster.request.errors import EngineFault
from cluster.router.side_by_side import side_by_side
from cluster.router.streams import Streams
from cluster.served_model import ServedModel
from cluster.text.text_threads import TextThreads
from replicas.request import TokenLogprobs

Piece: TypeAlias = tuple[int, ChoiceText]
"""Of the choice with this number, counted through all prompts."""
Events: TypeAlias = AsyncGenerator[Piece | Completed, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request's answer, to be written once."""

    streams: Streams
    threads: TextThreads
    ask: Ask
    model: ServedModel
    shape: Shape
    exchange: Exchange

    async def write(self) -> None:
        """As it was asked for. Raises RouterError, before or behind the first event."""
        parts = [self._answer_prompt(*each) for each in enumerate(self.ask.completions)]
        async with aclosing(parts[0] if len(parts) == 1 else side_by_side(parts)) as events:
            if self.ask.is_stream:
                await self._write_events(events)
            else:
                await self._write_document(events)

    async def _write_document(self, events: Events) -> None:
        choices: defaultdict[int, ChoiceText] = defaultdict(ChoiceText)
        ended: list[Completed] = []
        async for event in events:
            if isinstance(event, Completed):
                ended.append(event)
            else:
                choices[event[0]].add(event[1])
        figures = self._figures(ended)
        decode = self.model.tokenizer.decode
        document = {
            **self._head(self.shape.whole_name),
            "choices": [
                self.shape.whole(index, choices[index], decode) | self._tokens(choices[index])
                for index in sorted(choices)
            ],
            "usage": figures.usage_document(),
        }
        await self.exchange.reply.send_document(document, headers=figures.headers())

    async def _write_events(self, events: Events) -> None:
        """The joules come last: in the chunk with the usage where it is wanted, else in a comment."""
        reply = self.exchange.reply
        head = self._head(self.shape.chunk_name) | ({"usage": None} if self.ask.has_usage else {})
        sent_chars: dict[int, int] = {}
        ended: list[Completed] = []
        async for event in events:
            if isinstance(event, Completed):
                ended.append(event)
                continue
            index, piece = event
            chunk = self.shape.chunk(index, piece, self.model.tokenizer.decode, sent_chars.get(index))
            sent_chars[index] = sent_chars.get(index, 0) + len(piece.text)
            if not reply.has_begun:
                await reply.begin_events()
            await reply.send_event({**head, "choices": [chunk | self._tokens(piece)]})
        figures = self._figures(ended)
        if self.ask.has_usage:
            await reply.send_event({**head, "choices": [], "usage": figures.usage_document()})
        else:
            await reply.send_comment("energy", figures.energy_document())
        await reply.end_events(is_whole=True)

    async def _answer_prompt(self, position: int, completion: Completion) -> Events:
        """One prompt's pieces, its own text before them where it shall be echoed, then its end."""
        ask = self.ask
        echo = ChoiceText()
        if ask.echo:
            completion, echo = await self._prepare_echo(completion)
        echoed: set[int] = set()
        async with aclosing(self.streams.run(completion, self.exchange.caller(position))) as events:
            async for event in events:
                if isinstance(event, Completed):
                    yield event
                    continue
                if event.is_empty and not ask.has_token_ids:
                    continue
                index = position * ask.num_choices + event.index
                if ask.echo and index not in echoed and not event.is_empty:
                    echoed.add(index)
                    if completion.wants_prompt_logprobs and event.index == 0:
                        echo.logprobs = _of_prompt(echo, event)
                    yield index, echo
                if ask.has_answer:
                    yield index, _piece(event)
                elif event.finish is not None:
                    yield index, ChoiceText(finish=event.finish)

    async def _prepare_echo(self, completion: Completion) -> tuple[Completion, ChoiceText]:
        """The completion with the tokens of its prompt, so that they are told apart once, and its text."""
        token_ids = await self.streams.tokenize(self.model, completion.prompt)
        if isinstance(completion.prompt, TextPrompt):
            text = completion.prompt.text
        else:
            decode = partial(self.model.tokenizer.decode, token_ids)
            text = await self.threads.run(decode, size=len(token_ids))
        echo = ChoiceText(text=text, token_ids=list(token_ids), logprobs=[None] * len(token_ids))
        return replace(completion, prompt=TokenPrompt(ids=token_ids)), echo

    def _tokens(self, choice: ChoiceText) -> dict[str, Any]:
        return choice.tokens_document() if self.ask.has_token_ids else {}

    def _head(self, object_name: str) -> dict[str, Any]:
        return {
            "id": f"{self.shape.id_prefix}{self.exchange.request_id}",
            "object": object_name,
            "created": int(time()),
            "model": self.model.name,
        }

    def _figures(self, ended: list[Completed]) -> Figures:
        return figures_of(ended, num_choices=self.ask.num_choices, has_answer=self.ask.has_answer)


def _of_prompt(echo: ChoiceText, first: TextDelta) -> list[TokenLogprobs | None]:
    """What is said of a prompt's tokens: nothing of the first, which follows none."""
    if len(first.prompt_logprobs) != len(echo.token_ids) - 1:
        raise EngineFault("the replica did not say the logprobs of the prompt")
    return [None, *first.prompt_logprobs]


def _piece(delta: TextDelta) -> ChoiceText:
    unsaid = [None] * (len(delta.token_ids) - len(delta.logprobs))
    return ChoiceText(
        text=delta.text,
        token_ids=list(delta.token_ids),
        logprobs=[*delta.logprobs, *unsaid],
        finish=delta.finish,
        resume_token=delta.resume_token,
    )
