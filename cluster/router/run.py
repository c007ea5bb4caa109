"""One answer on its way: the replicas that worked on it, and the tokens its caller has."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.balancing.recording import RecordedDecision
from cluster.energy.account import EnergyAccount
from cluster.link.engine_job import EngineJob
from cluster.link.replica_connection import ReplicaConnection
from cluster.link.token_stream import TokenStream
from cluster.request.errors import RouterError
from cluster.request.failover import LossReason
from cluster.router.suspicion import CLEAR, Standing
from cluster.router.way_in import WayIn
from cluster.served_model import ServedModel
from cluster.telemetry.inference_span import InferenceSpan
from replicas.request import FinishReason, SequenceTiming


@dataclass(slots=True, kw_only=True)
class Attempt:
    """What one replica does for an answer.

    `decision`: the balancer's, that led there. None: it was not asked.
    """

    connection: ReplicaConnection
    stream: TokenStream
    account: EnergyAccount
    lane: int
    first_offset: int
    prompt_tokens: int
    decision: RecordedDecision | None = None
    is_over: bool = False
    """The request is not there any more: it ended, or went on elsewhere."""

    @property
    def num_tokens(self) -> int:
        """Given by this replica, read or not."""
        return self.stream.next_offset - self.first_offset

    @property
    def timing(self) -> SequenceTiming | None:
        """None: the engine gave none (yet)."""
        return self.stream.timing

    @property
    def wasted_tokens(self) -> int:
        """Computed, but not sent: over-run, recomputation, and the prompt of a resumed attempt."""
        engine_wasted = self.timing.wasted_tokens if self.timing else 0
        return self.stream.wasted_tokens + engine_wasted + self._repeated_tokens

    def release(self) -> None:
        """Nobody reads what this replica says any more."""
        self.is_over = True
        self.connection.release(self.stream)

    @property
    def is_repeated(self) -> bool:
        """Whether another replica had computed the prompt before."""
        return self.first_offset > 0

    @property
    def _repeated_tokens(self) -> int:
        """The prompt, where a token came of it before; it is computed again once there is another."""
        if not self.is_repeated or self.stream.first_token_s is None:
            return 0
        return self.prompt_tokens - (self.timing.cached_tokens if self.timing else 0)


@dataclass(slots=True, kw_only=True)
class Run:
    """One choice of a request, and how far it got. Mutable; owned by its stream.

    `index`: of the choice. `job` is what the caller asked for. `outcome` None when the books are
    closed: the caller went away.
    """

    request_id: str
    tenant: str
    arrived_s: float
    model: ServedModel
    way_in: WayIn
    job: EngineJob
    span: InferenceSpan
    attempts: list[Attempt]
    index: int = 0
    losses: list[LossReason] = field(default_factory=list)
    standing: Standing = CLEAR
    delivered_ids: array[int] = field(default_factory=lambda: array("I"))
    outcome: FinishReason | RouterError | None = None

    @property
    def attempt(self) -> Attempt:
        """The one under way, or the last."""
        return self.attempts[-1]

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """Offsets of the first token of every attempt that did not begin the answer."""
        first, *others = (attempt.first_offset for attempt in self.attempts)
        return (first, *others) if first > 0 else tuple(others)

    @property
    def first_token_s(self) -> float | None:
        times = (attempt.stream.first_token_s for attempt in self.attempts)
        return next((time_s for time_s in times if time_s is not None), None)

    @property
    def last_token_s(self) -> float | None:
        times = (attempt.stream.last_token_s for attempt in reversed(self.attempts))
        return next((time_s for time_s in times if time_s is not None), None)

    @property
    def has_all_tokens(self) -> bool:
        """The caller has as many as it asked for."""
        return len(self.delivered_ids) >= self.job.max_tokens

    def take(self, token_ids: Sequence[int]) -> None:
        """The caller gets these."""
        self.delivered_ids.extend(token_ids)

    def release(self) -> None:
        """Nobody reads any more."""
        for attempt in self.attempts:
            attempt.release()
