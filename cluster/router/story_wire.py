"""Stories as messages of `Cluster/Explain`."""

from __future__ import annotations

from cluster.admission.decision import Wait
from cluster.balancing.recording import RecordedDecision, write_decisions
from cluster.energy.account import EnergyAccount
from cluster.router.story import Leg, Story
from protos import wattline_cluster_pb2 as pb
from replicas.wire.trails import trail_to_wire


def story_message(story: Story, *, now_s: float) -> pb.RequestStory:
    """All of it; its joules are those known now."""
    message = pb.RequestStory(
        request_id=story.request_id,
        trace_id=story.trace_id,
        tenant=story.tenant,
        model=story.model,
        age_s=now_s - story.ended_s,
        outcome=story.outcome,
        refusal=story.refusal,
        queue=None if story.wait is None else _queue_message(story.wait),
        queued_ms=story.queued_s * 1e3,
        deadline_ms=_ms(story.deadline_s),
        slack_ms=_ms(story.slack_s),
        legs=[_leg_message(leg) for leg in story.legs],
    )
    if story.arrival is not None:
        message.arrival.in_flight = story.arrival.in_flight
        message.arrival.max_streams = story.arrival.max_streams
    decisions = [leg.decision for leg in story.legs if leg.decision is not None]
    if decisions:
        message.recording = write_decisions(decisions)
    if (closed := story.closed) is not None:
        message.MergeFrom(
            pb.RequestStory(
                prompt_tokens=closed.usage.prompt_tokens,
                cached_tokens=closed.usage.cached_tokens,
                output_tokens=closed.usage.completion_tokens,
                wasted_tokens=closed.usage.wasted_tokens,
                ttft_ms=closed.ttft_ms,
                tpot_ms=closed.tpot_ms,
                total_ms=closed.timing.total_ms,
                energy=_energy_message(closed.account),
            )
        )
    return message


def _leg_message(leg: Leg) -> pb.StoryLeg:
    timing, batches = leg.timing, leg.batches
    return pb.StoryLeg(
        choice_index=leg.choice_index,
        replica_id=leg.replica_id,
        epoch=leg.epoch,
        lane=leg.lane,
        submitted_ms=leg.submitted_s * 1e3,
        first_token_ms=_ms(leg.first_token_s),
        last_token_ms=_ms(leg.last_token_s),
        first_offset=leg.first_offset,
        output_tokens=leg.num_tokens,
        wasted_tokens=leg.wasted_tokens,
        batches=None
        if batches is None
        else pb.BatchMates(
            steps=batches.num_steps, min=batches.min_size, median=batches.median_size, max=batches.max_size
        ),
        loss=leg.loss or "",
        engine_queue_ms=None if timing is None else timing.queue_us / 1e3,
        prefill_ms=None if timing is None else timing.prefill_us / 1e3,
        decode_ms=None if timing is None else timing.decode_us / 1e3,
        energy=_energy_message(leg.account),
        trail=None if timing is None or timing.trail is None else trail_to_wire(timing.trail),
        choice=None if leg.decision is None else _choice_message(leg.decision),
    )


def _choice_message(decision: RecordedDecision) -> pb.StoryChoice:
    question, choice = decision.question, decision.choice
    return pb.StoryChoice(
        policy=question.policy,
        reason=choice.reason,
        target_ttft_ms=question.target.ttft_s * 1e3,
        target_tpot_ms=question.target.tpot_s * 1e3,
        expected_tokens=question.output_tokens,
        candidates=[
            pb.StoryCandidate(
                replica_id=candidate.lane.replica_id,
                lane=candidate.lane.lane,
                is_chosen=index == choice.index,
                is_session=candidate.is_session,
                requests=candidate.lane.num_requests,
                cached_tokens=candidate.cached_tokens,
                ttft_ms=score.ttft_s * 1e3,
                tpot_ms=score.tpot_s * 1e3,
                added_j=score.added_j if candidate.lane.has_price else None,
                has_kv=score.has_kv,
                is_hot=score.is_hot,
                is_in_time=score.is_in_time,
                snapshot_age_ms=candidate.lane.snapshot_age_s * 1e3,
            )
            for index, (candidate, score) in enumerate(zip(question.candidates, choice.scores, strict=True))
        ],
    )


def _queue_message(wait: Wait) -> pb.QueueCheck:
    return pb.QueueCheck(
        queued=wait.num_queued,
        max_queued=wait.max_queued,
        wait_ms=wait.wait_s * 1e3,
        start_ms=wait.start_s * 1e3,
        deadline_ms=_ms(wait.deadline_s),
        target_ttft_ms=_ms(wait.target_ttft_s),
    )


def _energy_message(account: EnergyAccount) -> pb.PhaseEnergy | None:
    energy = account.energy
    if energy is None:
        return None
    return pb.PhaseEnergy(
        prefill_j=energy.prefill_mj / 1e3,
        decode_j=energy.decode_mj / 1e3,
        static_j=energy.static_mj / 1e3,
        wasted_j=energy.wasted_mj / 1e3,
        source=energy.source,
        is_final=energy.is_final,
        host_j=None if energy.host_mj is None else energy.host_mj / 1e3,
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
