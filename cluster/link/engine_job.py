"""A request as it leaves the router for an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.text.answer_text import AnswerText
from replicas.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """What an engine is asked for, and the text side that stays here. `deadline_s`: time left; None: none.

    `cached_tokens` of the prompt are believed to be cached where it goes.
    `first_offset` is the number of tokens at the end of `prompt_ids` that the caller has already.
    """

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
    scores_prompt: bool = False
    tenant: str = ""
    attempt: int = 0
    first_offset: int = 0
    cached_tokens: int = 0

    def resumed(
        self,
        delivered_ids: Sequence[int],
        *,
        attempt: int,
        lane: int,
        deadline_s: float | None,
        cached_tokens: int = 0,
    ) -> EngineJob:
        """The rest of this job, for another engine. `self` is the first attempt's.

        The text side goes on as it is: detokeniser and stop texts have seen the delivered tokens.
        """
        assert self.attempt == 0 and len(delivered_ids) < self.max_tokens
        return replace(
            self,
            prompt_ids=(*self.prompt_ids, *delivered_ids),
            max_tokens=self.max_tokens - len(delivered_ids),
            first_offset=len(delivered_ids),
            attempt=attempt,
            lane=lane,
            deadline_s=deadline_s,
            # What is said of the prompt comes with the first token.
            scores_prompt=self.scores_prompt and len(delivered_ids) == 0,
            cached_tokens=cached_tokens,
        )
