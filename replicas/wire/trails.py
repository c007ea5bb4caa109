"""Where in an engine's steps a sequence was."""

from __future__ import annotations

from protos import wattline_link_pb2 as link_pb2
from replicas.step_trail import StepTrail, TokenGap


def trail_to_wire(trail: StepTrail) -> link_pb2.StepTrail:
    gap = trail.longest_gap
    return link_pb2.StepTrail(
        first_step=trail.first_step,
        first_token_step=trail.first_token_step or 0,
        last_step=trail.last_step,
        prefill_steps=trail.num_prefill_steps,
        decode_steps=trail.num_decode_steps,
        longest_gap=None
        if gap is None
        else link_pb2.TokenGap(duration_us=gap.duration_us, end_us=gap.end_us, step=gap.step),
    )


def trail_from_wire(message: link_pb2.StepTrail) -> StepTrail:
    gap = message.longest_gap
    return StepTrail(
        first_step=message.first_step,
        first_token_step=message.first_token_step or None,
        last_step=message.last_step,
        num_prefill_steps=message.prefill_steps,
        num_decode_steps=message.decode_steps,
        longest_gap=TokenGap(duration_us=gap.duration_us, end_us=gap.end_us, step=gap.step)
        if message.HasField("longest_gap")
        else None,
    )
