"""A question to the balancer and its answer. Plain data that can be written down and asked again."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.balancing.lane_view import LaneView


class Policy(StrEnum):
    """How a model's requests are spread; the text is what `models[].balancing` says."""

    ENERGY = "energy"
    """Where it adds the fewest joules, among those that keep the objective."""
    PREFIX = "prefix"
    """Where the first token comes soonest, cached prompts counted; hot replicas last."""
    LEAST_LOADED = "least_loaded"
    """Where the first token comes soonest, whatever is cached."""
    P2C = "p2c"
    """The less loaded of two drawn by lot."""
    ROUND_ROBIN = "round_robin"
    """One after another: the yardstick."""

    @property
    def uses_cache(self) -> bool:
        return self in (Policy.ENERGY, Policy.PREFIX)


class Reason(StrEnum):
    """Why the chosen lane was chosen."""

    POLICY = "policy"
    SESSION = "session"
    NONE_IN_TIME = "none_in_time"
    """No lane is expected to keep the objective: the soonest first token decided."""
    STALE = "stale"
    """Every snapshot was old: of two drawn by lot, the one with less of this router's own work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What every answer should keep, in seconds; the balancer plans to stay well below."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A lane that may take the request. `cached_tokens` of its prompt are believed to be there."""

    lane: LaneView
    cached_tokens: int = 0
    is_session: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """All that a choice depends on. `draw` feeds ties and lots, `turn` the round robin."""

    policy: Policy
    target: Target
    prompt_tokens: int
    output_tokens: int
    candidates: tuple[Candidate, ...]
    draw: int
    turn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What was predicted for a candidate."""

    ttft_s: float
    tpot_s: float
    added_j: float
    has_kv: bool
    is_hot: bool
    is_in_time: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The answer: an index into the question's candidates, parallel to which are the scores."""

    index: int
    reason: Reason
    scores: tuple[Score, ...]
