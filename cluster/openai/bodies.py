"""Bodies of OpenAI requests, with the common extensions of `SamplingBody`."""

from __future__ import annotations

from cluster.foreign.json_body import Body
from cluster.foreign.sampling_body import Few, SamplingBody, TokenIds, Uint32


class StreamOptions(Body):
    include_usage: bool | None = None


class ResumeBody(Body):
    """An answer that goes on: what its first choice said, in base64, and the tokens that came."""

    token: str
    token_ids: TokenIds


class AnswerBody(SamplingBody):
    """What both kinds of request have."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    resume: ResumeBody | None = None


class CompletionBody(AnswerBody):
    """`POST /v1/completions`."""

    prompt: str | TokenIds | Few[str] | Few[TokenIds]
    echo: bool | None = None
    logprobs: Uint32 | None = None


class ContentPart(Body):
    """A piece of a message; only text is served."""

    type: str
    text: str | None = None


class MessageBody(Body):
    role: str
    content: str | Few[ContentPart] | None = None


class ChatBody(AnswerBody):
    """`POST /v1/chat/completions`."""

    messages: Few[MessageBody]
    max_completion_tokens: Uint32 | None = None
    logprobs: bool | None = None
    top_logprobs: Uint32 | None = None
