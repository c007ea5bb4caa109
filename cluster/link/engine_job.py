"""A request as it leaves the router for an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.text.answer_text import AnswerText
from replicas.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """What an engine is asked for, and the text side that stays here. `deadline_s`: time left; None: none."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    priority: int
    deadline_s: float | None
    lane: int
    cache_salt: bytes
    traceparent: str
    text: AnswerText
    buffer_bytes: int
    on_overflow: Callable[[], None]
