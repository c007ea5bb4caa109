"""How many prompt tokens a step may take while others decode, so that a long prompt does not stall them.

Time is shared: beside the `decode_ms` of a step without prompts, prompts may take (stretch - 1) x decode_ms.
What they do not use is saved, for some steps, so a short prompt that comes now and then is computed at once.
Where more sequences wait for their first token than decode, prompts get the larger share that is theirs:

    8 decode, 1 prompt, stretch 2     half of the time: streams run at half their speed while it lasts
    1 decodes, 7 prompts, stretch 2   seven eighths of it

Pure: is told how long steps took. Owned by the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicas.request import StepRecord

SAVED_STEPS = 16
"""For how many decode steps prompts may use, or exceed, at once what is theirs."""
MIN_TOKENS = 16
"""What prompts may always take: they are never stopped, however dear they are."""
NEWEST_WEIGHT = 0.1
"""Of the newest step in the measured costs; they forget nine tenths of the past in 22 steps."""
LEAST_VARIANCE = 4.0
"""Of prompt tokens per step: below it, steps of like size say nothing of what one token costs."""
LEAST_DECODE_SHARE = 0.05
NS_PER_MS = 1e6


class PrefillPace:
    """Mutable: the measured costs, and the time saved or owed. Without a measurement there is no bound."""

    def __init__(self, *, stretch: float) -> None:
        self._stretch = stretch
        self._costs = _StepCosts()
        self._saved_ms = 0.0

    def tokens(self, *, num_decoding: int, num_prefilling: int, limit: int) -> int:
        """Prompt tokens of the next step, at most `limit`; that many where nobody decodes."""
        if not (num_decoding and self._costs.token_ms):
            return limit
        usable_ms = self._saved_ms + self._earned_ms(num_decoding, num_prefilling)
        return min(limit, max(MIN_TOKENS, int(usable_ms / self._costs.token_ms)))

    def observe(self, record: StepRecord, *, num_prefilling: int) -> None:
        """A step is done; `num_prefilling` sequences have prompt tokens left. Prompts alone say nothing."""
        num_prompt = sum([member.new_tokens for member in record.members if member.is_prefill])
        num_decoding = sum([not member.is_prefill for member in record.members])
        if not num_decoding:
            return
        self._costs.observe(num_prompt, (record.end_ns - record.start_ns) / NS_PER_MS)
        balance_ms = self._earned_ms(num_decoding, num_prefilling) - self._costs.token_ms * num_prompt
        bound_ms = SAVED_STEPS * (self._stretch - 1) * self._costs.decode_ms
        self._saved_ms = max(-bound_ms, min(bound_ms, self._saved_ms + balance_ms))

    def _earned_ms(self, num_decoding: int, num_prefilling: int) -> float:
        """The time beside one step of decodes that belongs to prompts."""
        return self._costs.decode_ms * max(self._stretch - 1, num_prefilling / num_decoding)


@dataclass(slots=True)
class _StepCosts:
    """Step time = decode_ms + token_ms x prompt tokens: a line through the latest steps, from moments."""

    token_ms: float = 0.0
    _tokens: float = 0.0
    _ms: float = 0.0
    _variance: float = 0.0
    _covariance: float = 0.0

    @property
    def decode_ms(self) -> float:
        return max(self._ms - self.token_ms * self._tokens, LEAST_DECODE_SHARE * self._ms)

    def observe(self, num_prompt: int, duration_ms: float) -> None:
        if not self._ms:
            self._tokens, self._ms = num_prompt, duration_ms
            return
        more_tokens, more_ms = num_prompt - self._tokens, duration_ms - self._ms
        self._tokens += NEWEST_WEIGHT * more_tokens
        self._ms += NEWEST_WEIGHT * more_ms
        kept = 1 - NEWEST_WEIGHT
        self._variance = kept * (self._variance + NEWEST_WEIGHT * more_tokens**2)
        self._covariance = kept * (self._covariance + NEWEST_WEIGHT * more_tokens * more_ms)
        if self._variance >= LEAST_VARIANCE and self._covariance > 0:
            self.token_ms = self._covariance / self._variance
