"""What happened to one request, and why: the limits it met, the decisions, the replicas, the joules.

Put together from its runs when the books are closed, kept for a while by `StoryRecord`, told by
`Cluster/Explain`. Ids, counts, times and joules: there is no text of a prompt or an answer in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.admission.decision import Arrival, Wait
from cluster.balancing.recording import RecordedDecision
from cluster.energy.account import EnergyAccount
from cluster.link.batch_sizes import BatchSpread
from cluster.request.failover import LossReason
from cluster.router.run import Attempt, Run
from cluster.router.way_in import WayIn
from cluster.telemetry.journal import ClosedRequest
from replicas.request import SequenceTiming


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What one replica did for one choice of the request; seconds are from the request's arrival.

    `decision` None: it went where its first choice was, or where it had begun, without asking. `loss`: how
    the replica was lost, if it was. `timing` and `batches` None: the engine gave none.
    """

    choice_index: int
    replica_id: str
    epoch: int
    lane: int
    decision: RecordedDecision | None
    submitted_s: float
    first_token_s: float | None
    last_token_s: float | None
    first_offset: int
    num_tokens: int
    wasted_tokens: int
    batches: BatchSpread | None
    loss: LossReason | None
    timing: SequenceTiming | None
    account: EnergyAccount

    @property
    def num_candidates(self) -> int:
        return 0 if self.decision is None else len(self.decision.question.candidates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """`wait` None: a lane could begin it at once. `refusal`: why it was not served, for those that were not.

    `closed` None: no replica had it. `deadline_s`: the time its caller had left when it was submitted, or
    else when it came to the queue; `slack_s`: what was left of it in the end, negative where it was late.
    """

    request_id: str
    trace_id: str
    tenant: str
    model: str
    ended_s: float
    refusal: str = ""
    outcome: str = ""
    arrival: Arrival | None = None
    wait: Wait | None = None
    queued_s: float = 0.0
    deadline_s: float | None = None
    slack_s: float | None = None
    legs: tuple[Leg, ...] = ()
    closed: ClosedRequest | None = None

    @property
    def num_candidates(self) -> int:
        """What makes a story large."""
        return sum(leg.num_candidates for leg in self.legs)


def story_of_unserved(way_in: WayIn, *, now_s: float, outcome: str, refusal: str) -> Story:
    """The story of a request that ended before a replica had it."""
    caller = way_in.caller
    deadline_s = way_in.wait.deadline_s if way_in.wait else None
    return Story(
        request_id=caller.request_id,
        trace_id=caller.span.trace_id,
        tenant=caller.tenant,
        model=way_in.model.name,
        ended_s=now_s,
        outcome=outcome,
        refusal=refusal,
        arrival=way_in.arrival,
        wait=way_in.wait,
        queued_s=way_in.waited_s(now_s=now_s),
        deadline_s=deadline_s,
        slack_s=None if deadline_s is None else caller.time_remaining_s(),
    )


def story_of(runs: Sequence[Run], closed: ClosedRequest) -> Story:
    """The story of a request that reached a replica."""
    first = runs[0]
    deadline_s = first.job.deadline_s
    elapsed_s = closed.ended_s - first.attempts[0].stream.submitted_s
    return Story(
        request_id=closed.request_id,
        trace_id=closed.trace_id,
        tenant=closed.tenant,
        model=closed.model,
        ended_s=closed.ended_s,
        outcome=closed.outcome,
        arrival=first.way_in.arrival,
        wait=first.way_in.wait,
        queued_s=first.way_in.queued_s,
        deadline_s=deadline_s,
        slack_s=None if deadline_s is None else deadline_s - elapsed_s,
        legs=tuple([leg for run in runs for leg in _legs(run)]),
        closed=closed,
    )


def _legs(run: Run) -> list[Leg]:
    """A loss ended the attempt of its own index; the tokens of one end where those of the next begin."""
    ends = [*(attempt.first_offset for attempt in run.attempts[1:]), len(run.delivered_ids)]
    losses = [*run.losses, *[None] * len(run.attempts)]
    return [
        _leg(run, attempt, loss=loss, end=end)
        for attempt, loss, end in zip(run.attempts, losses, ends, strict=False)
    ]


def _leg(run: Run, attempt: Attempt, *, loss: LossReason | None, end: int) -> Leg:
    stream = attempt.stream

    def since_arrival(time_s: float | None) -> float | None:
        return None if time_s is None else time_s - run.arrived_s

    return Leg(
        choice_index=run.index,
        replica_id=attempt.connection.replica_id,
        epoch=attempt.connection.epoch,
        lane=attempt.lane,
        decision=attempt.decision,
        submitted_s=stream.submitted_s - run.arrived_s,
        first_token_s=since_arrival(stream.first_token_s),
        last_token_s=since_arrival(stream.last_token_s),
        first_offset=attempt.first_offset,
        num_tokens=end - attempt.first_offset,
        wasted_tokens=attempt.wasted_tokens,
        batches=stream.batches.spread(),
        loss=loss,
        timing=attempt.timing,
        account=attempt.account,
    )
