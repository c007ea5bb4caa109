"""OpenAI bodies as `Completion`s. Pure: by way of our own messages, so that one validation serves them all.

What differs is said here: names of fields in errors, the default length of a completion, roles and seeds.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.foreign.sampling_body import check_best_of, generate_request, in_their_words, seed_of
from cluster.openai.bodies import AnswerBody, ChatBody, CompletionBody, MessageBody
from cluster.request.completion import Completion
from cluster.request.errors import InvalidRequest
from cluster.request.validation import RequestBounds, parse_chat, parse_generate
from protos import wattline_inference_pb2 as pb
from replicas.engine.request_check import MAX_PROMPT_LOGPROBS

DEFAULT_COMPLETION_TOKENS = 16
"""Of this protocol; a chat goes on as long as the model lets it."""
MAX_PROMPTS = 64
"""In one request; each is a stream of its own at the router."""
OUR_ROLES = {"developer": "system"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One HTTP request: a completion per prompt, and how the answer is written.

    `num_logprobs` None: none are wanted. `echo`: the prompt comes first in the answer. `has_answer` False:
    nothing but the prompt is wanted; one token is drawn all the same. `has_token_ids`: choices say their
    tokens, and how to go on elsewhere.
    """

    completions: tuple[Completion, ...]
    is_stream: bool
    has_usage: bool
    num_logprobs: int | None = None
    echo: bool = False
    has_answer: bool = True
    has_token_ids: bool = False

    @property
    def num_choices(self) -> int:
        """Per prompt."""
        return self.completions[0].num_choices


def completion_ask(body: CompletionBody, bounds: RequestBounds, draw_seed: Callable[[], int]) -> Ask:
    """A validated `/v1/completions`. Raises InvalidRequest."""
    check_best_of(body)
    echo = body.echo or False
    if echo and (body.logprobs or 0) > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            field="logprobs",
            got=body.logprobs,
            limit=f"0 to {MAX_PROMPT_LOGPROBS} with echo",
            fix="ask for fewer",
        )
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    has_answer = max_tokens > 0 or not echo
    prompts = _prompts(body)
    seed = seed_of(body, draw_seed)
    request = generate_request(body.model, body, max_tokens=max_tokens if has_answer else 1, seed=seed)
    if body.logprobs is not None:
        request.sampling.logprobs = body.logprobs
    if body.resume is not None and (echo or len(prompts) > 1):
        raise InvalidRequest(
            field="resume", got="echo, or several prompts", limit="one, without echo", fix="leave it out"
        )
    _resume(request, body)
    completions = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokens.CopyFrom(pb.TokenIds(ids=prompt))
        where = f"prompt[{index}]" if len(prompts) > 1 else "prompt"
        completions.append(in_their_words(lambda: parse_generate(request, bounds, draw_seed), prompt=where))
    if echo and body.logprobs is not None:
        completions = [replace(each, wants_prompt_logprobs=True) for each in completions]
    return Ask(
        completions=tuple(completions),
        is_stream=body.stream or False,
        has_usage=bool(body.stream_options and body.stream_options.include_usage),
        num_logprobs=body.logprobs,
        echo=echo,
        has_answer=has_answer,
        has_token_ids=body.return_token_ids or False,
    )


def chat_ask(body: ChatBody, bounds: RequestBounds, draw_seed: Callable[[], int]) -> Ask:
    """A validated `/v1/chat/completions`. Raises InvalidRequest."""
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest(
            field="top_logprobs",
            got=body.top_logprobs,
            limit="unset without logprobs",
            fix="set logprobs to true",
        )
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    seed = seed_of(body, draw_seed)
    generate = generate_request(body.model, body, max_tokens=max_tokens, seed=seed)
    request = pb.ChatRequest(
        model=generate.model,
        messages=[_message(message, index) for index, message in enumerate(body.messages)],
        sampling=generate.sampling,
        limits=generate.limits,
        priority=generate.priority,
    )
    if generate.HasField("energy_wait_ms"):
        request.energy_wait_ms = generate.energy_wait_ms
    if num_logprobs is not None:
        request.sampling.logprobs = num_logprobs
    _resume(request, body)
    completion = in_their_words(lambda: parse_chat(request, bounds, draw_seed), prompt="messages")
    return Ask(
        completions=(completion,),
        is_stream=body.stream or False,
        has_usage=bool(body.stream_options and body.stream_options.include_usage),
        num_logprobs=num_logprobs,
        has_token_ids=body.return_token_ids or False,
    )


def _resume(request: pb.GenerateRequest | pb.ChatRequest, body: AnswerBody) -> None:
    """Where the answer goes on, if it has begun. Raises InvalidRequest."""
    if body.resume is None:
        return
    try:
        token = b64decode(body.resume.token, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            field="resume.token",
            got="no base64",
            limit="the resume_token of a choice",
            fix="send it as it was",
        ) from None
    request.resume.CopyFrom(pb.Resume(token=token, token_ids=body.resume.token_ids))


def _prompts(body: CompletionBody) -> Sequence[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest(field="prompt", got="an empty list", limit="1 or more", fix="send a prompt")
    if isinstance(prompt[0], int):
        return [[token_id for token_id in prompt if isinstance(token_id, int)]]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(
            field="prompt",
            got=f"{len(prompt)} prompts",
            limit=f"1 to {MAX_PROMPTS}",
            fix="send several requests",
        )
    return [each for each in prompt if not isinstance(each, int)]


def _message(message: MessageBody, index: int) -> pb.Message:
    content = message.content or ""
    if not isinstance(content, str):
        for part_index, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise InvalidRequest(
                    field=f"messages[{index}].content[{part_index}]",
                    got="a part that is no text",
                    limit="parts of type text",
                    fix="send text alone",
                )
        content = "".join(part.text or "" for part in content)
    return pb.Message(role=OUR_ROLES.get(message.role, message.role), content=content)
