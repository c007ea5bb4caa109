"""Chooses the lane for a request: score every candidate, then let the model's policy pick. Pure.

Candidates are few (`route_finder.py` draws them), so the cost of a choice does not grow with the cluster.
A lane is hot where it is fuller than most and at least half full, or short of KV: hot ones are taken only
where there are no cold ones, which keeps a popular prefix from piling up at its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TypeAlias

from cluster.balancing.decision import Candidate, Choice, Policy, Question, Reason, Score
from cluster.balancing.prediction import (
    added_joules,
    has_kv_for,
    predicted_tpot_s,
    predicted_ttft_s,
)

FRESH_S = 1.0
"""A snapshot older than this says too little; an idle replica's heartbeat comes four times as often."""
LATE_S = 0.6
"""After two missed heartbeats a replica counts as hot."""
HOT_QUANTILE = 0.8
HOT_SHARE = 0.5
"""Of its rows: a lane below it is not hot, however idle the others are."""
HEADROOM = 0.7
"""Of the objective: replicas packed to the very edge of it miss it."""
SESSION_FACTOR = 1.5
SESSION_GRACE_S = 0.010
"""How much later the first token may come for the sake of the session's own replica."""
SAME_COST = 1.05
"""Costs this close are equal: measured watts are not better than that."""

Pick: TypeAlias = "Callable[[Sequence[int], Question, Sequence[Score], Random], tuple[int, Reason]]"


def choose(question: Question) -> Choice | None:
    """The candidate that takes the request; None if none has room. Same question, same answer."""
    candidates = question.candidates
    open_indexes = [index for index, one in enumerate(candidates) if one.lane.has_room]
    if not open_indexes:
        return None
    random = Random(question.draw)
    hot_above = _hot_above([one.lane.num_requests for one in candidates])
    scores = tuple([_score(one, question, hot_above) for one in candidates])
    fresh = [index for index in open_indexes if candidates[index].lane.snapshot_age_s <= FRESH_S]
    if fresh:
        index, reason = PICKS[question.policy](fresh, question, scores, random)
    else:
        pair = random.sample(open_indexes, k=min(2, len(open_indexes)))
        index, reason = min(pair, key=lambda each: candidates[each].lane.in_flight), Reason.STALE
    return Choice(index=index, reason=reason, scores=scores)


def _score(candidate: Candidate, question: Question, hot_above: int) -> Score:
    lane, target, output_tokens = candidate.lane, question.target, question.output_tokens
    uncached_tokens = max(1, question.prompt_tokens - candidate.cached_tokens)
    ttft_s = predicted_ttft_s(lane, uncached_tokens=uncached_tokens, output_tokens=output_tokens)
    tpot_s = predicted_tpot_s(lane)
    has_kv = has_kv_for(lane, uncached_tokens=uncached_tokens, output_tokens=output_tokens)
    is_fuller = lane.num_requests > max(hot_above, HOT_SHARE * lane.max_sequences)
    return Score(
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        added_j=added_joules(lane, uncached_tokens=uncached_tokens, output_tokens=output_tokens),
        has_kv=has_kv,
        is_hot=is_fuller or not has_kv or lane.snapshot_age_s > LATE_S,
        is_in_time=(
            has_kv
            and lane.num_requests < lane.max_sequences
            and ttft_s <= HEADROOM * target.ttft_s
            and tpot_s <= HEADROOM * target.tpot_s
        ),
    )


def _hot_above(loads: Sequence[int]) -> int:
    """The load that four fifths do not exceed; of few lanes, at least the fullest does."""
    return sorted(loads)[int(HOT_QUANTILE * (len(loads) - 1))]


def _round_robin(
    open_indexes: Sequence[int], question: Question, scores: Sequence[Score], random: Random
) -> tuple[int, Reason]:
    def name(index: int) -> tuple[str, int]:
        lane = question.candidates[index].lane
        return lane.replica_id, lane.lane

    return sorted(open_indexes, key=name)[question.turn % len(open_indexes)], Reason.POLICY


def _p2c(
    open_indexes: Sequence[int], question: Question, scores: Sequence[Score], random: Random
) -> tuple[int, Reason]:
    pair = random.sample(open_indexes, k=min(2, len(open_indexes)))
    return min(pair, key=lambda index: question.candidates[index].lane.num_requests), Reason.POLICY


def _least_loaded(
    open_indexes: Sequence[int], question: Question, scores: Sequence[Score], random: Random
) -> tuple[int, Reason]:
    def key(index: int) -> tuple[float, int, float]:
        return scores[index].ttft_s, question.candidates[index].lane.num_requests, random.random()

    return min(open_indexes, key=key), Reason.POLICY


def _prefix(
    open_indexes: Sequence[int], question: Question, scores: Sequence[Score], random: Random
) -> tuple[int, Reason]:
    cold = [index for index in open_indexes if not scores[index].is_hot]
    if not cold:
        return min(
            open_indexes, key=lambda index: (question.candidates[index].lane.num_requests, random.random())
        ), Reason.POLICY
    best, reason = _least_loaded(cold, question, scores, random)
    limit_s = SESSION_FACTOR * scores[best].ttft_s + SESSION_GRACE_S
    for index in cold:
        if question.candidates[index].is_session and scores[index].ttft_s <= limit_s:
            return index, Reason.SESSION
    return best, reason


def _energy(
    open_indexes: Sequence[int], question: Question, scores: Sequence[Score], random: Random
) -> tuple[int, Reason]:
    in_time = [index for index in open_indexes if scores[index].is_in_time]
    if not in_time:
        index, _ = _prefix(open_indexes, question, scores, random)
        return index, Reason.NONE_IN_TIME
    limit_j = SAME_COST * min(scores[index].added_j for index in in_time)
    cheap = [index for index in in_time if scores[index].added_j <= limit_j]
    for index in cheap:
        if question.candidates[index].is_session:
            return index, Reason.SESSION
    oldest = max(cheap, key=lambda index: (question.candidates[index].lane.attached_age_s, random.random()))
    return oldest, Reason.POLICY


PICKS: Mapping[Policy, Pick] = {
    Policy.ENERGY: _energy,
    Policy.PREFIX: _prefix,
    Policy.LEAST_LOADED: _least_loaded,
    Policy.P2C: _p2c,
    Policy.ROUND_ROBIN: _round_robin,
}
"""The table. A new policy is a new line here and in `Policy`."""
