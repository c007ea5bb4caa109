"""A caller's request as the router knows it: validated, not yet tokens. Plain data, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from replicas.request import SamplingParams


class Operation(StrEnum):
    """What was asked for; the text is the GenAI operation name."""

    CHAT = "chat"
    TEXT_COMPLETION = "text_completion"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    turns: tuple[Turn, ...]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """An answer that goes on: the token of its first delta, and the tokens the caller has.

    `identity` is what the token says of the weights, `num_deaths` what it holds against the request, once it
    is opened.
    """

    token: bytes
    token_ids: tuple[int, ...]
    identity: bytes = b""
    num_deaths: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One request. `max_tokens` None: what the context leaves; `energy_wait_ms` None: server's default.

    `session_id` empty: no session."""

    model: str
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int | None = None
    stop_texts: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    priority: int = 0
    energy_wait_ms: int | None = None
    session_id: str = ""
    resume: Resume | None = None
    num_choices: int = 1
    wants_prompt_logprobs: bool = False

    @property
    def delivered_ids(self) -> tuple[int, ...]:
        """What the caller has of the answer already."""
        return self.resume.token_ids if self.resume else ()

    @property
    def operation(self) -> Operation:
        return Operation.CHAT if isinstance(self.prompt, ChatPrompt) else Operation.TEXT_COMPLETION
