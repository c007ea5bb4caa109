"""The choices of an OpenAI answer as they grow, and their logprobs in both of that protocol's shapes."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.openai.json_pieces import Entries
from replicas.request import FinishReason, TokenLogprobs

REPLACEMENT = "\ufffd"
MAX_TOKENS_OF_CHARACTER = 4
"""It has no more bytes."""
FINISH_REASONS = {None: None, FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}

Decode = Callable[[Sequence[int]], str]


@dataclass(slots=True, kw_only=True)
class ChoiceText:
    """A choice as far as it came, or a piece of one. `logprobs` is parallel to `token_ids`. Mutable.

    `resume_token`: on pieces of an answer that could go on elsewhere; the newest counts.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish: FinishReason | None = None
    resume_token: bytes = b""

    def add(self, piece: ChoiceText) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish = piece.finish or self.finish

    def tokens_document(self) -> dict[str, Any]:
        """Its tokens, and how to go on behind them at another router."""
        resume = {"resume_token": b64encode(self.resume_token).decode()} if self.resume_token else {}
        return {"token_ids": self.token_ids, **resume}

    @property
    def finish_reason(self) -> str | None:
        return FINISH_REASONS[self.finish]


def token_text(token_id: int, decode: Decode) -> str:
    """Its own text. A token that has none, a special one, is named by its id."""
    return decode((token_id,)) or f"token_id:{token_id}"


def completion_logprobs(
    token_ids: Sequence[int], said: Sequence[TokenLogprobs | None], decode: Decode, *, first_offset: int = 0
) -> dict[str, Any]:
    """Of `/v1/completions`: parallel lists. None: the first token of a prompt, of which nothing is said.

    The sampled token is among the likeliest, whether it is one of them or not.
    """
    return {
        "tokens": Entries(token_text(token_id, decode) for token_id in token_ids),
        "token_logprobs": Entries(None if entry is None else entry.logprob for entry in said),
        "top_logprobs": Entries(
            None if entry is None else _by_text((*entry.top, (token_id, entry.logprob)), decode)
            for token_id, entry in zip(token_ids, said, strict=True)
        ),
        "text_offset": Entries(text_offsets(token_ids, decode, first_offset=first_offset)),
    }


def text_offsets(token_ids: Sequence[int], decode: Decode, *, first_offset: int) -> Iterator[int]:
    """Where in the text each token begins: parts of a character with it, a token without text where it is."""
    open_ids: list[int] = []
    offset = first_offset
    for token_id in token_ids:
        yield offset
        open_ids.append(token_id)
        text = decode(open_ids)
        if not text.endswith(REPLACEMENT) or len(open_ids) == MAX_TOKENS_OF_CHARACTER:
            offset += len(text)
            open_ids.clear()


def chat_logprobs(
    token_ids: Sequence[int], said: Sequence[TokenLogprobs | None], decode: Decode
) -> dict[str, Any]:
    """Of `/v1/chat/completions`: one entry for each token."""
    return {
        "content": Entries(
            _entry(token_id, entry.logprob, decode)
            | {"top_logprobs": [_entry(top_id, logprob, decode) for top_id, logprob in entry.top]}
            for token_id, entry in zip(token_ids, said, strict=True)
            if entry is not None
        ),
        "refusal": None,
    }


def _by_text(pairs: Iterable[tuple[int, float]], decode: Decode) -> dict[str, float]:
    """Of tokens with one text, as halves of characters are, the likeliest stays: it comes first."""
    by_text: dict[str, float] = {}
    for token_id, logprob in pairs:
        by_text.setdefault(token_text(token_id, decode), logprob)
    return by_text


def _entry(token_id: int, logprob: float, decode: Decode) -> dict[str, Any]:
    text = token_text(token_id, decode)
    # Half a character has no text, and its bytes are not known here.
    known = None if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": known}
