"""A token fits the question it was made for, of that tenant, for an hour; and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.request.completion import Completion, Resume, TextPrompt
from cluster.request.errors import ResumeRefused
from cluster.request.failover import ReplicaIdentity
from cluster.request.resume_token import (
    LIFE_S,
    TOKEN_BYTES,
    ResumeSeal,
    digest_identity,
    digest_question,
)
from replicas.request import SamplingParams

IDENTITY = ReplicaIdentity(model="m", weights_digest="w", tokenizer_digest="t")
SAMPLING = SamplingParams(temperature=1.0, seed=7)
ASKED = Completion(model="m", prompt=TextPrompt(text="hello"), sampling=SAMPLING, max_tokens=20)
PROMPT_IDS = (5, 6, 7)


class FakeClock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def question(tenant: str = "acme", prompt_ids: tuple[int, ...] = PROMPT_IDS, **changes: Any) -> bytes:
    return digest_question(replace(ASKED, **changes), prompt_ids, tenant=tenant)


def make_token(seal: ResumeSeal) -> bytes:
    return seal.seal(seed=2**64 - 1, question=question(), identity=IDENTITY)


def test_a_token_brings_back_seed_and_weights() -> None:
    seal = ResumeSeal(b"k" * 32)
    token = make_token(seal)
    assert len(token) == TOKEN_BYTES < 256
    claims = ResumeSeal(b"k" * 32).open(token, question=question())
    assert (claims.seed, claims.identity) == (2**64 - 1, digest_identity(IDENTITY))


@pytest.mark.parametrize(
    "other",
    [
        question(tenant="other"),
        question(prompt_ids=(5, 6, 8)),
        question(model="n"),
        question(max_tokens=21),
        question(stop_texts=("x",)),
        question(stop_token_ids=frozenset({1})),
        question(ignore_eos=True),
        question(sampling=replace(SAMPLING, temperature=0.5)),
    ],
)
def test_a_token_is_for_one_question(other: bytes) -> None:
    seal = ResumeSeal(b"k" * 32)
    with pytest.raises(ResumeRefused, match="belongs to another request; send the request as it was"):
        seal.open(make_token(seal), question=other)


def test_the_seed_and_what_was_delivered_are_no_part_of_the_question() -> None:
    resumed = question(sampling=replace(SAMPLING, seed=1), resume=Resume(token=b"x", token_ids=(1,)))
    assert resumed == question()


def test_a_token_holds_for_an_hour() -> None:
    clock = FakeClock()
    seal = ResumeSeal(b"k" * 32, clock_s=clock)
    token = make_token(seal)
    clock.now_s += LIFE_S - 1
    seal.open(token, question=question())
    clock.now_s += 1
    with pytest.raises(ResumeRefused, match="is older than 3600 s; start over without it"):
        seal.open(token, question=question())


def test_a_token_says_how_many_deaths_are_held_against_the_request() -> None:
    seal = ResumeSeal(b"k" * 32)
    for num_deaths, told in ((0, 0), (1, 1), (15, 15), (99, 15)):
        token = seal.seal(num_deaths, seed=1, question=question(), identity=IDENTITY)
        assert seal.open(token, question=question()).num_deaths == told
        assert len(token) == TOKEN_BYTES


def test_other_routers_tokens_are_refused() -> None:
    with pytest.raises(ResumeRefused, match="was not made by these routers"):
        ResumeSeal(b"x" * 32).open(make_token(ResumeSeal(b"k" * 32)), question=question())


@settings(derandomize=True, max_examples=100, deadline=None)
@given(at=st.integers(0, TOKEN_BYTES - 1), bit=st.integers(0, 7), cut=st.booleans())
def test_a_changed_token_is_refused(at: int, bit: int, cut: bool) -> None:
    seal = ResumeSeal(b"k" * 32)
    token = bytearray(make_token(seal))
    token[at] ^= 1 << bit
    with pytest.raises(ResumeRefused):
        seal.open(bytes(token[:at] if cut else token), question=question())
