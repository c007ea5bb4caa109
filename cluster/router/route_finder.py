"""Finds the replica for a request: draws a few candidates, asks the balancer, and says where it goes.

Candidates are a random sample, the lanes that hold most of the prompt, the session's own replica, and the one
chosen last, so that packing goes on where it was. All of them where there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from cluster.balancing.balancer import choose
from cluster.balancing.decision import Candidate, Policy, Question, Target
from cluster.balancing.lane_view import LaneView
from cluster.balancing.prefix_index import LaneKey
from cluster.balancing.recording import RecordedDecision
from cluster.balancing.session import session_owner
from cluster.config import ModelSection
from cluster.link.replica_connection import ReplicaConnection
from cluster.link.replica_pool import ReplicaPool
from cluster.request.failover import ReplicaIdentity
from replicas.engine.prefix_hash import extend_hashes

SAMPLE_SIZE = 8
"""Lanes drawn by lot; where a model has no more, all are compared."""
NUM_PREFIX_OWNERS = 2
MAX_HASHED_TOKENS = 8192
"""Of a prompt; what lies behind is rarely shared, and hashing costs a tenth of a microsecond a token."""
DEFAULT_TTFT_S = 0.5
DEFAULT_TPOT_S = 0.1
"""What packing keeps for a model without an objective of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What has to be placed. `output_tokens` is what is expected, not what is allowed."""

    prompt_ids: Sequence[int]
    output_tokens: int
    cache_salt: bytes
    session_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where it goes, and the decision that led there."""

    connection: ReplicaConnection
    lane: int
    cached_tokens: int
    decision: RecordedDecision


class RouteFinder:
    """Mutable: its lots and turns. Owned by the event loop."""

    def __init__(self, *, pool: ReplicaPool, random: Random) -> None:
        self._pool = pool
        self._random = random
        self._turns: dict[str, int] = {}
        self._last: dict[str, str] = {}
        """By model, the replica chosen last."""
        self._hashed: dict[str, tuple[Errand, int, list[bytes]]] = {}
        """By model, for whom and with which block size hashes were made: the head of a queue asks often."""

    def find(
        self,
        section: ModelSection,
        errand: Errand,
        *,
        identity: ReplicaIdentity | None = None,
        accepts: Callable[[ReplicaConnection], bool] = lambda _: True,
        takes: Callable[[LaneView], bool] = lambda _: True,
    ) -> Place | None:
        """The best place among replicas that `accepts` and lanes that `takes`; None: there is none now.

        `identity` asks for equal weights and tokens.
        """
        ready = [
            one
            for one in self._pool.ready(section.name)
            if (identity is None or one.identity == identity) and accepts(one)
        ]
        if not ready:
            return None
        policy = Policy(section.balancing)
        cached = self._cached_tokens(section.name, ready, errand) if policy.uses_cache else {}
        owner = _session_owner(errand.session_id, ready)
        candidates = tuple(
            [
                Candidate(
                    lane=view,
                    cached_tokens=cached.get((view.replica_id, view.lane), 0),
                    is_session=view.replica_id == owner,
                )
                for connection in self._sample(section.name, policy, ready, {owner, *_best_owners(cached)})
                for view in connection.lane_views()
                if takes(view)
            ]
        )
        question = Question(
            policy=policy,
            target=target_of(section),
            prompt_tokens=len(errand.prompt_ids),
            output_tokens=errand.output_tokens,
            candidates=candidates,
            draw=self._random.getrandbits(32),
            turn=self._turns.get(section.name, 0),
        )
        choice = choose(question)
        if choice is None:
            return None
        chosen = candidates[choice.index]
        self._turns[section.name] = question.turn + 1
        self._last[section.name] = chosen.lane.replica_id
        connection = self._pool.find(chosen.lane.replica_id)
        assert connection is not None, "a ready replica is in the pool"
        return Place(
            connection=connection,
            lane=chosen.lane.lane,
            cached_tokens=chosen.cached_tokens,
            decision=RecordedDecision(question=question, choice=choice),
        )

    def _sample(
        self, model: str, policy: Policy, ready: Sequence[ReplicaConnection], wanted: set[str | None]
    ) -> list[ReplicaConnection]:
        """A few of many, the wanted ones among them. A round robin needs all for its turns."""
        if len(ready) <= SAMPLE_SIZE or policy is Policy.ROUND_ROBIN:
            return list(ready)
        sample = self._random.sample(ready, k=SAMPLE_SIZE)
        names = {one.replica_id for one in sample}
        wanted.add(self._last.get(model))
        return sample + [one for one in ready if one.replica_id in wanted - names]

    def _cached_tokens(
        self, model: str, ready: Iterable[ReplicaConnection], errand: Errand
    ) -> dict[LaneKey, int]:
        """Tokens of the prompt believed to be cached, by lane; at least its last one is computed."""
        index = self._pool.prefixes
        hashed: dict[int, dict[LaneKey, int]] = {}
        found: dict[LaneKey, int] = {}
        for connection in ready:
            block_tokens = connection.hello.block_tokens
            if not block_tokens or not index:
                continue
            if block_tokens not in hashed:
                hashed[block_tokens] = index.match(self._hashes(model, errand, block_tokens))
            matches = hashed[block_tokens]
            if not matches:
                continue
            for lane in range(max(1, connection.hello.lanes)):
                count = matches.get((connection.replica_id, lane), 0)
                if count:
                    found[connection.replica_id, lane] = count * block_tokens
        return found

    def _hashes(self, model: str, errand: Errand, block_tokens: int) -> list[bytes]:
        of, size, hashes = self._hashed.get(model, (None, 0, []))
        if of is not errand or size != block_tokens:
            hashes = []
            tokens = list(errand.prompt_ids[: min(len(errand.prompt_ids) - 1, MAX_HASHED_TOKENS)])
            extend_hashes(hashes, tokens, block_tokens=block_tokens, salt=errand.cache_salt)
            self._hashed[model] = (errand, block_tokens, hashes)
        return hashes


def target_of(section: ModelSection) -> Target:
    """What the balancer keeps: the model's objective, or a sane default where it has none."""
    slo = section.slo
    return Target(
        ttft_s=DEFAULT_TTFT_S if slo.ttft_ms is None else slo.ttft_ms / 1e3,
        tpot_s=DEFAULT_TPOT_S if slo.tpot_ms is None else slo.tpot_ms / 1e3,
    )


def _session_owner(session_id: str, ready: Iterable[ReplicaConnection]) -> str | None:
    if not session_id:
        return None
    return session_owner(session_id, [one.replica_id for one in ready])


def _best_owners(cached: dict[LaneKey, int]) -> list[str]:
    best = sorted(cached, key=lambda owner: (-cached[owner], owner))[:NUM_PREFIX_OWNERS]
    return [replica_id for replica_id, _ in best]
