"""How many prompt tokens a step may take while others decode, so that a long prompt does not stall them.

Time is shared: beside the `decode_ms` of a step without prompts, prompts may take (stretch - 1) x decode_ms.
What they do not use is saved, for some steps, so a short prompt that comes now and then is computed at once;
what they take beyond it is owed, and paid by steps without them. Where more sequences wait for their first
token than decode, prompts get the larger share that is theirs:

    8 decode, 1 prompt, stretch 2     half of the time: streams run at half their speed while it lasts
    1 decodes, 7 prompts, stretch 2   seven eighths of it

Prompts share a step until they take as long as the rest of it. Where a step takes f whatever its prompts and
each of n takes p, their first tokens come after f + n p if they share it, and after k (f + p), k = 1..n, if
they do not: in the mean that is sooner if p > f.

What counts is the time that steps took, not what was foreseen: a token costs the more the longer its prompt
is. So now and then a step goes without prompts, to measure what decoding alone takes.
Pure: is told how long steps took. Owned by the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicas.request import StepRecord

SAVED_STEPS = 8
"""For how many decode steps prompts may use, or exceed, at once what is theirs."""
MEASURED_EVERY = 16
"""Steps with prompts in a row, at most: the next is of decodes alone."""
MIN_TOKENS = 16
"""What a step with prompts always takes, however dear they are."""
UNMEASURED_TOKENS = 128
"""With which a step takes no further prompt as long as nobody knows what they cost."""
NEWEST_WEIGHT = 0.1
"""Of the newest step with prompts in its costs; they forget nine tenths of the past in 22 steps."""
NEWEST_DECODE_WEIGHT = 0.3
"""Of the newest step without."""
LEAST_VARIANCE = 4.0
"""Of prompt tokens per step: below it, steps of like size say nothing of what one token costs."""
NS_PER_MS = 1e6


class PrefillPace:
    """Mutable: the measured costs, and the time saved or owed. `is_packing`: on a device that computes many
    prompt tokens as fast as few, where prompts share a step for as long as it has room."""

    def __init__(self, *, stretch: float, is_packing: bool) -> None:
        self._stretch = stretch
        self._is_packing = is_packing
        self._costs = _PromptCosts()
        self._decode_ms: dict[int, float] = {}
        """Of steps without prompts, by the order of magnitude of their sequences."""
        self._saved_ms = 0.0
        self._num_since_measured = 0

    def tokens(self, *, num_decoding: int, num_prefilling: int, limit: int) -> int:
        """Prompt tokens of the next step, at most `limit`; that many where nobody decodes."""
        if not num_decoding:
            return limit
        decode_ms = self._decode_time(num_decoding)
        if decode_ms is None or self._num_since_measured >= self._measured_every(num_decoding):
            return 0
        if not self._costs.mean_ms:
            return limit
        usable_ms = self._saved_ms + decode_ms * self._share(num_decoding, num_prefilling)
        # A step with prompts may cost something whatever their number: it is worth it for twice as much.
        if usable_ms < min(2 * self._costs.fixed_ms, self._bound_ms(decode_ms)):
            return 0
        return min(limit, max(MIN_TOKENS, self._costs.tokens_in(usable_ms)))

    def packed_tokens(self, *, num_decoding: int, limit: int) -> int:
        """Prompt tokens, at most `limit`, with which a step takes no more prompts. One takes what it may."""
        decode_ms = self._decode_time(num_decoding)
        if self._is_packing or not limit:
            return limit
        if decode_ms is None or not self._costs.mean_ms:
            return min(limit, UNMEASURED_TOKENS)
        return max(1, min(limit, int(decode_ms / self._costs.mean_token_ms)))

    def observe(self, record: StepRecord, *, num_prefilling: int) -> None:
        """A step is done; `num_prefilling` sequences have prompt tokens left. Prompts alone say nothing."""
        num_prompt = record.rows.num_prompt_tokens
        num_decoding = record.rows.num_decoding
        if not num_decoding:
            return
        duration_ms = (record.end_ns - record.start_ns) / NS_PER_MS
        decode_ms = self._decode_time(num_decoding)
        prompt_ms = 0.0
        if not num_prompt:
            decode_ms = self._note_decode(num_decoding, duration_ms)
        elif decode_ms is None:
            return
        else:
            prompt_ms = max(duration_ms - decode_ms, 0.0)
            self._num_since_measured += 1
            self._costs.observe(num_prompt, prompt_ms)
        balance_ms = decode_ms * self._share(num_decoding, num_prefilling) - prompt_ms
        bound_ms = self._bound_ms(decode_ms)
        self._saved_ms = max(-bound_ms, min(bound_ms, self._saved_ms + balance_ms))

    def _decode_time(self, num_decoding: int) -> float | None:
        """Of a step without prompts, of so many sequences or the most alike; None: there was none yet."""
        magnitude = _magnitude(num_decoding)
        nearest = min(self._decode_ms, key=lambda known: abs(known - magnitude), default=None)
        return None if nearest is None else self._decode_ms[nearest]

    def _note_decode(self, num_decoding: int, duration_ms: float) -> float:
        magnitude = _magnitude(num_decoding)
        before_ms = self._decode_ms.get(magnitude, duration_ms)
        self._decode_ms[magnitude] = before_ms + NEWEST_DECODE_WEIGHT * (duration_ms - before_ms)
        self._num_since_measured = 0
        return self._decode_ms[magnitude]

    def _measured_every(self, num_decoding: int) -> int:
        """Steps with prompts before one without: few where so many sequences never decoded alone."""
        return MEASURED_EVERY if _magnitude(num_decoding) in self._decode_ms else 1

    def _share(self, num_decoding: int, num_prefilling: int) -> float:
        """The time that belongs to prompts, over that of a step of decodes."""
        return max(self._stretch - 1, num_prefilling / num_decoding)

    def _bound_ms(self, decode_ms: float) -> float:
        return SAVED_STEPS * (self._stretch - 1) * decode_ms


@dataclass(slots=True)
class _PromptCosts:
    """Time of a step's prompts = fixed_ms + token_ms x tokens: a line through the latest, from moments."""

    token_ms: float = 0.0
    mean_ms: float = 0.0
    _tokens: float = 0.0
    _variance: float = 0.0
    _covariance: float = 0.0

    @property
    def mean_token_ms(self) -> float:
        """Of a prompt token with its share of `fixed_ms`: what noise disturbs least."""
        return self.mean_ms / self._tokens

    @property
    def fixed_ms(self) -> float:
        return max(self.mean_ms - self.token_ms * self._tokens, 0.0)

    def tokens_in(self, usable_ms: float) -> int:
        return int((usable_ms - self.fixed_ms) / self.token_ms)

    def observe(self, num_prompt: int, duration_ms: float) -> None:
        if not self.mean_ms:
            self._tokens, self.mean_ms, self.token_ms = num_prompt, duration_ms, duration_ms / num_prompt
            return
        more_tokens, more_ms = num_prompt - self._tokens, duration_ms - self.mean_ms
        self._tokens += NEWEST_WEIGHT * more_tokens
        self.mean_ms += NEWEST_WEIGHT * more_ms
        kept = 1 - NEWEST_WEIGHT
        self._variance = kept * (self._variance + NEWEST_WEIGHT * more_tokens**2)
        self._covariance = kept * (self._covariance + NEWEST_WEIGHT * more_tokens * more_ms)
        if self._variance >= LEAST_VARIANCE and self._covariance > 0:
            self.token_ms = self._covariance / self._variance


def _magnitude(count: int) -> int:
    return count.bit_length()
