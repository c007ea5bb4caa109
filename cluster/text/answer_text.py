"""The text of one answer: tokens in, pieces for the caller out, ended by stop texts and stop tokens. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.text.detokenizer import Detokenizer
from cluster.text.stop_matcher import StopMatcher
from cluster.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """What some tokens gave: `text` may lag behind `token_ids`, `wasted_tokens` came after the stop."""

    text: str
    token_ids: tuple[int, ...]
    is_stopped: bool
    wasted_tokens: int


class AnswerText:
    """Owned by one stream; the detokenising thread is the only one that calls it."""

    __slots__ = ("_detokenizer", "_is_stopped", "_matcher", "_stop_token_ids")

    def __init__(
        self, tokenizer: Tokenizer, *, stop_texts: tuple[str, ...], stop_token_ids: frozenset[int]
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stop_texts) if stop_texts else None
        self._stop_token_ids = stop_token_ids
        self._is_stopped = False

    def feed(self, token_ids: tuple[int, ...], *, is_last: bool) -> Piece:
        """The piece for new tokens. A stop token counts as sent, but has no text."""
        if self._is_stopped:
            return Piece("", (), True, len(token_ids))
        if self._matcher is None and self._stop_token_ids.isdisjoint(token_ids):
            text = self._detokenizer.feed(token_ids) if token_ids else ""
            return Piece(text + self._detokenizer.flush() if is_last else text, token_ids, False, 0)
        return self._feed_one_by_one(token_ids, is_last=is_last)

    def _feed_one_by_one(self, token_ids: tuple[int, ...], *, is_last: bool) -> Piece:
        """Token by token, so that the count of sent tokens does not depend on the chunking."""
        text = ""
        for index, token_id in enumerate(token_ids):
            if token_id in self._stop_token_ids:
                self._is_stopped = True
                text += self._flush()
            else:
                text += self._match(self._detokenizer.feed((token_id,)))
                self._is_stopped = self._matcher is not None and self._matcher.is_stopped
            if self._is_stopped:
                return Piece(text, token_ids[: index + 1], True, len(token_ids) - index - 1)
        if is_last:
            text += self._flush()
            # The last bytes can complete a stop text only as U+FFFD; it counts as found all the same.
            self._is_stopped = self._matcher is not None and self._matcher.is_stopped
        return Piece(text, token_ids, self._is_stopped, 0)

    def _match(self, text: str) -> str:
        return text if self._matcher is None else self._matcher.feed(text)

    def _flush(self) -> str:
        text = self._match(self._detokenizer.flush())
        return text if self._matcher is None else text + self._matcher.flush()
