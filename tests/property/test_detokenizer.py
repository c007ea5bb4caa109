"""However tokens are chunked, the pieces join to the text of all tokens, cut at the stop that ends first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from cluster.request.completion import Turn
from cluster.text.answer_text import AnswerText
from cluster.text.null_tokenizer import NullTokenizer
from cluster.text.tokenizer import Tokenizer

CORPUS = ["the quick brown fox", "naïve café 日本語 🙂🙂", "  spaces   and\nlines\t", "don't stop, stop!"]


class TrainedTokenizer:
    """A small BPE as checkpoints have it: byte-level (Llama 3, Granite) or with metaspace (Llama 2)."""

    has_chat_template = False
    digest = ""

    def __init__(self, *, is_byte_level: bool) -> None:
        rust = RustTokenizer(models.BPE(unk_token=None if is_byte_level else "<unk>"))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel() if is_byte_level else pre_tokenizers.Metaspace()
        rust.decoder = decoders.ByteLevel() if is_byte_level else decoders.Metaspace()
        alphabet = pre_tokenizers.ByteLevel.alphabet() if is_byte_level else []
        specials = ["<eos>", "<unk>"]
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, initial_alphabet=alphabet)
        rust.train_from_iterator(CORPUS, trainer)
        self._rust = rust
        self.vocab_size = rust.get_vocab_size()
        self.special_ids = frozenset({0, 1})

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._rust.encode(text).ids)

    def encode_chat(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._rust.decode(list(ids), skip_special_tokens=True)
        return text


TOKENIZERS: dict[str, Tokenizer] = {
    "null": NullTokenizer(1000),
    "byte-level": TrainedTokenizer(is_byte_level=True),
    "metaspace": TrainedTokenizer(is_byte_level=False),
}


@st.composite
def chunked_answers(draw: st.DrawFn) -> tuple[Tokenizer, list[tuple[int, ...]]]:
    """A tokenizer, and any tokens of it: text, random ids (broken characters too), or both; cut anywhere."""
    tokenizer = TOKENIZERS[draw(st.sampled_from(sorted(TOKENIZERS)))]
    random_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=90)
    text_ids = st.text(alphabet="ab don't stéop日本🙂\n ", max_size=60).map(tokenizer.encode)
    ids = [*draw(text_ids), *draw(random_ids), *draw(text_ids)]
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=40)))
    edges = [0, *cuts, len(ids)]
    return tokenizer, [tuple(ids[start:end]) for start, end in pairwise(edges)]


def run(tokenizer: Tokenizer, chunks: list[tuple[int, ...]], stops: tuple[str, ...]) -> tuple[str, int, bool]:
    """Joined text, count of sent tokens, and whether a stop was found."""
    answer = AnswerText(tokenizer, stop_texts=stops, stop_token_ids=frozenset())
    pieces = [answer.feed(chunk, is_last=index == len(chunks) - 1) for index, chunk in enumerate(chunks)]
    sent = sum(len(piece.token_ids) for piece in pieces)
    assert sent + sum(piece.wasted_tokens for piece in pieces) == sum(map(len, chunks))
    return "".join(piece.text for piece in pieces), sent, pieces[-1].is_stopped


def cut_at_stop(text: str, stops: tuple[str, ...]) -> str:
    """The oracle: before the stop that is complete first, of two that end together the longer."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


@given(chunked_answers())
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_whole_text(answer: tuple[Tokenizer, list[tuple[int, ...]]]) -> None:
    tokenizer, chunks = answer
    whole = [token_id for chunk in chunks for token_id in chunk]
    assert run(tokenizer, chunks, ()) == (tokenizer.decode(whole), len(whole), False)


@given(
    chunked_answers(),
    st.lists(st.text(alphabet="ab stop日🙂\ufffd", min_size=1, max_size=5), min_size=1, max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_the_answer_is_cut_at_the_earliest_stop(
    answer: tuple[Tokenizer, list[tuple[int, ...]]], stops: list[str]
) -> None:
    tokenizer, chunks = answer
    whole = tuple(token_id for chunk in chunks for token_id in chunk)
    text, sent, is_stopped = run(tokenizer, chunks, tuple(stops))
    assert text == cut_at_stop(tokenizer.decode(whole), tuple(stops))
    one_by_one: list[tuple[int, ...]] = [(token_id,) for token_id in whole] or [()]
    assert run(tokenizer, one_by_one, tuple(stops)) == (text, sent, is_stopped)
