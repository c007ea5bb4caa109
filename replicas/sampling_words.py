"""Sampling parameters as the int32 words of a step plan: six for a plain row, more for one that wants more.

Floats travel as float32, so all ranks compute with the same values: a planner that wants to see what they see
plans `as_float32`.
"""

from __future__ import annotations

import struct

from replicas.request import SamplingParams

_PLAIN_WORDS = struct.Struct("=5i")
_PLAIN_FIELDS = struct.Struct("=ffiQ")
_EDIT_WORDS = struct.Struct("=4i")
_EDIT_FIELDS = struct.Struct("=4f")
_IS_PLAIN = -1
"""In the place of the number of biases: no edits follow."""

_NO_LOGPROBS = -1


def sampling_to_words(sampling: SamplingParams) -> list[int]:
    """Five plain words, the number of biases, the edits, the logprobs asked, the biased ids, their biases."""
    plain = _PLAIN_FIELDS.pack(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)
    words = [*_PLAIN_WORDS.unpack(plain)]
    if sampling.is_plain:
        return [*words, _IS_PLAIN]
    edits = _EDIT_FIELDS.pack(
        sampling.min_p, sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    )
    num_biases = len(sampling.logit_bias)
    ids = [token_id for token_id, _ in sampling.logit_bias]
    biases = struct.pack(f"={num_biases}f", *(bias for _, bias in sampling.logit_bias))
    return [
        *words,
        num_biases,
        *_EDIT_WORDS.unpack(edits),
        _NO_LOGPROBS if sampling.num_logprobs is None else sampling.num_logprobs,
        *ids,
        *struct.unpack(f"={num_biases}i", biases),
    ]


def sampling_from_words(words: list[int], at: int) -> tuple[SamplingParams, int]:
    """The parameters whose words begin at `at`, and where they end."""
    temperature, top_p, top_k, seed = _PLAIN_FIELDS.unpack(_PLAIN_WORDS.pack(*words[at : at + 5]))
    num_biases = words[at + 5]
    at += 6
    if num_biases == _IS_PLAIN:
        return SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed), at
    min_p, repetition, presence, frequency = _EDIT_FIELDS.unpack(_EDIT_WORDS.pack(*words[at : at + 4]))
    num_logprobs = words[at + 4]
    ids_at, biases_at = at + 5, at + 5 + num_biases
    end = biases_at + num_biases
    biases = struct.unpack(f"={num_biases}f", struct.pack(f"={num_biases}i", *words[biases_at:end]))
    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple(zip(words[ids_at:biases_at], biases, strict=True)),
        num_logprobs=None if num_logprobs == _NO_LOGPROBS else num_logprobs,
    )
    return sampling, end


def as_float32(sampling: SamplingParams) -> SamplingParams:
    """The parameters every rank sees: floats cut to what a plan word holds."""
    return sampling_from_words(sampling_to_words(sampling), 0)[0]
