"""What the router needs of a tokenizer. Implemented in `tokenizers.py` (checkpoints), `null_tokenizer.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.request.completion import Turn


class Tokenizer(Protocol):
    """Text to tokens and back. Stateless: any thread may call it."""

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens without text."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` works."""

    @property
    def digest(self) -> str:
        """Of the tokenizer's files, as a replica computes it; empty: not known."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a plain prompt, with the model's beginning-of-text token if it has one."""

    def encode_chat(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Tokens of a conversation in the model's template, the answer's opening included.

        Raises ValueError where the template refuses the conversation.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, specials left out; bytes that make no character become U+FFFD."""
