"""Whether an interrupted stream goes on at another replica: the decision, its budget, its quarantine. Pure.

A stream is worth a second try, not an endless one: two resumptions a request, a tenth of the traffic, and
none for a request that a second replica died of (`suspicion.py` says which one that is).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from hashlib import blake2b
from typing import NamedTuple

QUARANTINE_S = 600.0
MAX_QUARANTINED = 1024


class LossReason(StrEnum):
    """How a stream lost its replica; the text is the label of the metric."""

    KILLED = "killed"
    """The link ended without a word: the process, its host or the way there is gone."""
    FAILED = "failed"
    """The replica said that its group is lost."""
    FROZEN = "frozen"
    """Nothing came while work was in flight."""
    DRAINED = "drained"
    """The replica is being replaced, and its time to drain was over."""
    REFUSED = "refused"
    """The replica did not take the request, or gave it up."""

    @property
    def is_kill(self) -> bool:
        """Whether the request may have been the cause."""
        return self in (LossReason.KILLED, LossReason.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaIdentity:
    """What has to be equal for one replica to go on where another stopped."""

    model: str
    weights_digest: str
    tokenizer_digest: str


class Verdict(Enum):
    RESUME = auto()
    QUARANTINE = auto()
    REQUEST_SPENT = auto()
    BUDGET_SPENT = auto()


def decide(num_losses: int, *, is_culprit: bool, per_request: int, has_budget: bool) -> Verdict:
    """What becomes of a stream that has lost so many replicas, and whether the last one died of it."""
    if is_culprit:
        return Verdict.QUARANTINE
    if num_losses > per_request:
        return Verdict.REQUEST_SPENT
    return Verdict.RESUME if has_budget else Verdict.BUDGET_SPENT


class FailoverBudget:
    """A token bucket: an admitted request adds `ratio`, a resumption takes one, at most `burst` are kept.

    It starts full: a replica that dies early takes a whole batch of streams with it. Owned by the event loop.
    """

    def __init__(self, *, ratio: float, burst: int) -> None:
        self._ratio = ratio
        self._burst = float(burst)
        self._tokens = self._burst

    @property
    def has_token(self) -> bool:
        return self._tokens >= 1.0

    def earn(self) -> None:
        """A request was admitted."""
        self._tokens = min(self._burst, self._tokens + self._ratio)

    def spend(self) -> None:
        """A stream goes on elsewhere."""
        assert self.has_token
        self._tokens -= 1.0


class Suspect(NamedTuple):
    """A prompt without its text, and without its seed: a server draws another one at each try."""

    model: str
    num_tokens: int
    digest: bytes


class Quarantine:
    """Prompts that are refused for a while; of too many, the oldest is let go. Owned by the event loop."""

    def __init__(self, *, capacity: int = MAX_QUARANTINED, hold_s: float = QUARANTINE_S) -> None:
        self._capacity = capacity
        self._hold_s = hold_s
        self._until_s: OrderedDict[Suspect, float] = OrderedDict()
        """The next to be let go comes first."""
        self._sizes: set[tuple[str, int]] = set()
        """Model and length of each, so that no other prompt need be hashed."""

    def __len__(self) -> int:
        return len(self._until_s)

    def add(self, model: str, prompt_ids: Sequence[int], *, now_s: float) -> None:
        suspect = _suspect(model, prompt_ids)
        self._until_s[suspect] = now_s + self._hold_s
        self._until_s.move_to_end(suspect)
        if len(self._until_s) > self._capacity:
            self._let_go()
        self._sizes.add((model, len(prompt_ids)))

    def holds(self, model: str, prompt_ids: Sequence[int], *, now_s: float) -> bool:
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            self._let_go()
        return (model, len(prompt_ids)) in self._sizes and _suspect(model, prompt_ids) in self._until_s

    def _let_go(self) -> None:
        self._until_s.popitem(last=False)
        self._sizes = {(suspect.model, suspect.num_tokens) for suspect in self._until_s}


def _suspect(model: str, prompt_ids: Sequence[int]) -> Suspect:
    digest = blake2b(array("I", prompt_ids).tobytes(), digest_size=16)
    return Suspect(model, len(prompt_ids), digest.digest())
