"""The two shapes of an OpenAI answer: a text completion, and a message. Documents and chunks; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from cluster.openai.choice_text import ChoiceText, Decode, chat_logprobs, completion_logprobs


class Shape(Protocol):
    """How one kind of answer is written."""

    @property
    def id_prefix(self) -> str: ...

    @property
    def whole_name(self) -> str:
        """What a document calls itself."""

    @property
    def chunk_name(self) -> str:
        """What an event calls itself."""

    def whole(self, index: int, choice: ChoiceText, decode: Decode) -> dict[str, Any]:
        """A finished choice."""

    def chunk(self, index: int, piece: ChoiceText, decode: Decode, sent_chars: int | None) -> dict[str, Any]:
        """A new piece of a choice, of which so many characters went out. None: it is the first."""


@dataclass(frozen=True, slots=True)
class CompletionShape:
    has_logprobs: bool
    id_prefix: str = "cmpl-"
    whole_name: str = "text_completion"
    chunk_name: str = "text_completion"

    def whole(self, index: int, choice: ChoiceText, decode: Decode) -> dict[str, Any]:
        return self._choice(index, choice, decode, first_offset=0)

    def chunk(self, index: int, piece: ChoiceText, decode: Decode, sent_chars: int | None) -> dict[str, Any]:
        return self._choice(index, piece, decode, first_offset=sent_chars or 0)

    def _choice(self, index: int, piece: ChoiceText, decode: Decode, *, first_offset: int) -> dict[str, Any]:
        said = None
        if self.has_logprobs:
            said = completion_logprobs(piece.token_ids, piece.logprobs, decode, first_offset=first_offset)
        return {"index": index, "text": piece.text, "logprobs": said, "finish_reason": piece.finish_reason}


@dataclass(frozen=True, slots=True)
class ChatShape:
    has_logprobs: bool
    id_prefix: str = "chatcmpl-"
    whole_name: str = "chat.completion"
    chunk_name: str = "chat.completion.chunk"

    def whole(self, index: int, choice: ChoiceText, decode: Decode) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message} | self._end(choice, decode)

    def chunk(self, index: int, piece: ChoiceText, decode: Decode, sent_chars: int | None) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if sent_chars is None else {}
        if piece.text or sent_chars is None:
            delta["content"] = piece.text
        return {"index": index, "delta": delta} | self._end(piece, decode)

    def _end(self, piece: ChoiceText, decode: Decode) -> dict[str, Any]:
        said = chat_logprobs(piece.token_ids, piece.logprobs, decode) if self.has_logprobs else None
        return {"logprobs": said, "finish_reason": piece.finish_reason}
