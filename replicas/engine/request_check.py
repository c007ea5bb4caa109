"""Refuses, before it is queued, a request that no step should ever see. Pure; called by the scheduler."""

from __future__ import annotations

import math

from replicas.engine.prefix_hash import MAX_SALT_BYTES
from replicas.errors import BadRequest, DoesNotFit
from replicas.request import GenerationRequest, SamplingParams

MAX_SEED = 2**64 - 1
MAX_TOP_K = 2**31 - 1
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.1, 10.0
MAX_PENALTY = 2.0
"""Of presence and frequency, to either side of 0."""
MAX_LOGIT_BIAS = 100.0
MAX_BIASED_TOKENS = 300
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 5
"""Beside each token of a prompt, of which there are thousands."""


def check_request(
    request: GenerationRequest,
    *,
    vocab_size: int,
    context_tokens: int,
    num_lanes: int,
    scores_prompts: bool = True,
) -> None:
    """Raise BadRequest with the field, its value and the limit."""
    prompt_ids = request.prompt_ids
    if not 0 <= request.lane < num_lanes:
        raise BadRequest(f"lane is {request.lane}; this engine has lanes 0 to {num_lanes - 1}")
    if not prompt_ids:
        raise BadRequest("prompt_ids is empty; give at least one token")
    if len(prompt_ids) >= context_tokens:
        raise DoesNotFit(
            f"prompt_ids holds {len(prompt_ids)} tokens; a context of {context_tokens} leaves room for "
            f"{context_tokens - 1}; shorten the prompt"
        )
    for token_id in (min(prompt_ids), max(prompt_ids)):
        if not 0 <= token_id < vocab_size:
            raise BadRequest(f"prompt_ids holds {token_id}; the vocabulary is 0 to {vocab_size - 1}")
    if request.max_tokens < 1:
        raise BadRequest(f"max_tokens is {request.max_tokens}; ask for at least 1")
    if not 0 <= request.first_offset <= len(prompt_ids):
        raise BadRequest(f"first_offset is {request.first_offset}; the prompt holds {len(prompt_ids)} tokens")
    if len(request.cache_salt) > MAX_SALT_BYTES:
        raise BadRequest(f"cache_salt holds {len(request.cache_salt)} bytes; at most {MAX_SALT_BYTES}")
    _check_sampling(request.sampling)
    _check_edits(request.sampling, vocab_size=vocab_size)
    if request.scores_prompt:
        _check_scoring(request.sampling, scores_prompts=scores_prompts)


def _check_sampling(sampling: SamplingParams) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise BadRequest(f"temperature is {sampling.temperature}; give a finite number of at least 0")
    if not 0 < sampling.top_p <= 1:
        raise BadRequest(f"top_p is {sampling.top_p}; give a number above 0 and up to 1")
    if not 0 <= sampling.top_k <= MAX_TOP_K:
        raise BadRequest(f"top_k is {sampling.top_k}; give 0 (all tokens) to {MAX_TOP_K}")
    if not 0 <= sampling.seed <= MAX_SEED:
        raise BadRequest(f"seed is {sampling.seed}; give an unsigned 64-bit number")
    if not 0 <= sampling.min_p <= 1:
        raise BadRequest(f"min_p is {sampling.min_p}; give a number from 0 to 1")


def _check_scoring(sampling: SamplingParams, *, scores_prompts: bool) -> None:
    if not scores_prompts:
        raise BadRequest(
            "prompt_logprobs is set; this engine says none of prompts, ask for those of the answer"
        )
    if sampling.num_logprobs is None or sampling.num_logprobs > MAX_PROMPT_LOGPROBS:
        raise BadRequest(
            f"logprobs is {sampling.num_logprobs}; give 0 to {MAX_PROMPT_LOGPROBS} with prompt_logprobs"
        )


def _check_edits(sampling: SamplingParams, *, vocab_size: int) -> None:
    """Comparisons are false for what is not a number, so that is refused, too."""
    if not MIN_REPETITION_PENALTY <= sampling.repetition_penalty <= MAX_REPETITION_PENALTY:
        raise BadRequest(
            f"repetition_penalty is {sampling.repetition_penalty}; give a number from "
            f"{MIN_REPETITION_PENALTY} to {MAX_REPETITION_PENALTY}"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(getattr(sampling, name)) <= MAX_PENALTY:
            raise BadRequest(
                f"{name} is {getattr(sampling, name)}; give a number from {-MAX_PENALTY} to {MAX_PENALTY}"
            )
    max_logprobs = min(MAX_LOGPROBS, vocab_size)
    if sampling.num_logprobs is not None and not 0 <= sampling.num_logprobs <= max_logprobs:
        raise BadRequest(f"logprobs is {sampling.num_logprobs}; give 0 to {max_logprobs}")
    if len(sampling.logit_bias) > MAX_BIASED_TOKENS:
        raise BadRequest(f"logit_bias holds {len(sampling.logit_bias)} tokens; at most {MAX_BIASED_TOKENS}")
    for token_id, bias in sampling.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise BadRequest(f"logit_bias holds token {token_id}; the vocabulary is 0 to {vocab_size - 1}")
        if not abs(bias) <= MAX_LOGIT_BIAS:
            raise BadRequest(
                f"logit_bias of token {token_id} is {bias}; give {-MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}"
            )
