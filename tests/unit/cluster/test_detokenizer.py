"""Incremental detokenisation with the null tokenizer, whose tokens are bytes: easy to cut wrong."""

from __future__ import annotations

from cluster.text.answer_text import AnswerText, Piece
from cluster.text.detokenizer import MAX_UNSTABLE_WINDOW, MAX_WINDOW, Detokenizer
from cluster.text.null_tokenizer import NullTokenizer

TOKENIZER = NullTokenizer(1000)


def feed_bytes(content: bytes) -> list[str]:
    """The pieces for bytes fed one by one, and the flush."""
    detokenizer = Detokenizer(TOKENIZER)
    return [*(detokenizer.feed((byte + 3,)) for byte in content), detokenizer.flush()]


def make_answer(*stop_texts: str, stop_token_ids: frozenset[int] = frozenset()) -> AnswerText:
    return AnswerText(TOKENIZER, stop_texts=stop_texts, stop_token_ids=stop_token_ids)


def test_a_character_comes_when_its_last_byte_does() -> None:
    assert feed_bytes("a€b".encode()) == ["a", "", "", "€", "b", ""]


def test_a_character_that_never_ends_is_flushed_as_a_replacement() -> None:
    assert feed_bytes("a€".encode()[:-1]) == ["a", "", "", "\ufffd"]


def test_garbage_bytes_come_late_by_one_and_stay_in_bounds() -> None:
    pieces = feed_bytes(b"\x80" * (3 * MAX_UNSTABLE_WINDOW))
    assert pieces == ["", *["\ufffd"] * (3 * MAX_UNSTABLE_WINDOW - 1), "\ufffd"]


def test_the_window_stays_small_however_long_the_answer() -> None:
    decoded_lengths: list[int] = []

    class CountingTokenizer(NullTokenizer):
        def decode(self, ids: object) -> str:
            assert isinstance(ids, list)
            decoded_lengths.append(len(ids))
            return super().decode(ids)

    detokenizer = Detokenizer(CountingTokenizer(1000))
    text = "naïve 日本語 " * 100
    assert "".join(detokenizer.feed((byte + 3,)) for byte in text.encode()) == text
    assert max(decoded_lengths) <= MAX_WINDOW + 4


def test_special_tokens_have_no_text() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.feed((0,)), detokenizer.feed((100, 1)), detokenizer.feed((2,))] == ["", "a", ""]


def test_tokens_behind_the_stop_are_wasted() -> None:
    answer = make_answer("END")
    tokens = TOKENIZER.encode("a END!!")
    assert answer.feed(tokens, is_last=False) == Piece("a ", tokens[:5], True, 2)
    assert answer.feed(tokens, is_last=True) == Piece("", (), True, 7)


def test_a_stop_token_is_sent_without_its_text() -> None:
    answer = make_answer(stop_token_ids=frozenset({100}))
    assert answer.feed((101, 100, 102), is_last=False) == Piece("b", (101, 100), True, 1)


def test_the_last_piece_brings_what_was_held_back() -> None:
    answer = make_answer("END")
    assert answer.feed(TOKENIZER.encode("xEN"), is_last=False).text == "x"
    assert answer.feed((), is_last=True) == Piece("EN", (), False, 0)
