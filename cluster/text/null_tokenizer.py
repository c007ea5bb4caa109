"""The tokenizer of the null engine: a byte is a token, any other token a made-up word. Needs no files."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.request.completion import Turn

NUM_SPECIAL = 3
"""Ids 0, 1, 2: padding, beginning and end of text."""
NUM_BYTES = 256
LETTERS = "etaoinshrdlucmfw"


class NullTokenizer:
    """Id = byte + 3, folded into vocabularies that are smaller than that."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.special_ids = frozenset(range(NUM_SPECIAL))
        self.has_chat_template = True
        self.digest = ""

    def encode(self, text: str) -> tuple[int, ...]:
        num_plain = self.vocab_size - NUM_SPECIAL
        return tuple(byte % num_plain + NUM_SPECIAL for byte in text.encode())

    def encode_chat(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        rendered = "".join(f"<{turn.role}>{turn.content}\n" for turn in turns)
        return self.encode(rendered + "<assistant>")

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(_token_bytes, ids)).decode("utf-8", errors="replace")


def _token_bytes(token_id: int) -> bytes:
    if token_id < NUM_SPECIAL:
        return b""
    if token_id < NUM_SPECIAL + NUM_BYTES:
        return bytes((token_id - NUM_SPECIAL,))
    letters = (LETTERS[token_id >> shift & 15] for shift in (0, 4, 8, 12))
    return (" " + "".join(letters)).encode()
