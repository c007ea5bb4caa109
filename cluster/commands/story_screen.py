"""The story of a request, for a person: what it met, what each replica did, and why that one was chosen."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from cluster.commands.status_screen import new_table, show_number
from protos import wattline_cluster_pb2 as pb
from protos.wattline_link_pb2 import StepTrail

GOOD_OUTCOMES = {"stop", "length"}
REASONS = {
    "policy": "it was the best by the model's policy",
    "session": "it is the session's own replica, and nearly as good as the best",
    "none_in_time": "no lane was expected to keep the objective: the soonest first token decided",
    "stale": "all loads were old: the less busy of two drawn by lot",
}


def render_story(story: pb.RequestStory) -> Group:
    """Everything that is known of it."""
    parts: list[RenderableType] = [*_headline(story), *map(Text, _sentences(story))]
    for leg in story.legs:
        parts += [Text(""), *_leg(leg)]
        if leg.HasField("choice"):
            parts += [Text(f"  {_why_chosen(leg)}"), _candidates(leg.choice)]
    return Group(*parts)


def _headline(story: pb.RequestStory) -> list[Text]:
    style = "green" if story.outcome in GOOD_OUTCOMES else "red"
    text = Text(f"{story.request_id}  {story.model}  ")
    text.append(story.outcome, style=f"bold {style}")
    text.append(f"  {story.age_s:,.0f} s ago", style="dim")
    return [text, Text(f"tenant {story.tenant}, trace {story.trace_id}", style="dim")]


def _sentences(story: pb.RequestStory) -> list[str]:
    if story.refusal:
        queue = [_queue(story)] if story.HasField("queue") else []
        return [f"not served: {story.refusal}", *queue, *_deadline(story)]
    return [_limits(story), _queue(story), *_deadline(story), _tokens(story), _energy(story)]


def _limits(story: pb.RequestStory) -> str:
    if not story.HasField("arrival"):
        return "limits: not recorded"
    arrival = story.arrival
    return f"limits: {arrival.in_flight} of {arrival.max_streams} streams in flight, none of the tenant's hit"


def _queue(story: pb.RequestStory) -> str:
    if not story.HasField("queue"):
        return f"queue: none; a lane could begin it at once ({story.queued_ms:.1f} ms to the submission)"
    queue = story.queue
    line = (
        f"queue: waited {story.queued_ms:.0f} ms behind {queue.queued} of at most {queue.max_queued}; "
        f"predicted were {queue.wait_ms:.0f} ms, and {queue.start_ms:.0f} ms to the first token"
    )
    if queue.HasField("target_ttft_ms"):
        line += f", objective {queue.target_ttft_ms:g} ms"
    return line


def _deadline(story: pb.RequestStory) -> list[str]:
    if not story.HasField("deadline_ms"):
        return []
    since = "before it waited" if story.refusal else "at submission"
    word = "left of it" if story.slack_ms >= 0 else "over it"
    return [f"deadline: {story.deadline_ms:.0f} ms {since}, {abs(story.slack_ms):.0f} ms {word} in the end"]


def _tokens(story: pb.RequestStory) -> str:
    line = f"tokens: {story.prompt_tokens} in ({story.cached_tokens} cached), {story.output_tokens} out"
    if story.wasted_tokens:
        line += f", {story.wasted_tokens} computed in vain"
    if story.HasField("ttft_ms"):
        line += f"; first after {story.ttft_ms:.1f} ms"
    if story.HasField("tpot_ms"):
        line += f", then one each {story.tpot_ms:.2f} ms"
    return f"{line}; {story.total_ms:.0f} ms in all"


def _energy(story: pb.RequestStory) -> str:
    if not story.HasField("energy"):
        return "joules: unknown"
    energy = story.energy
    state = "final" if energy.is_final else "provisional"
    host = f"; beside them {show_number(energy.host_j)} of the host" if energy.HasField("host_j") else ""
    return (
        f"joules: {show_number(energy.prefill_j)} prefill + {show_number(energy.decode_j)} decode, "
        f"of them {show_number(energy.static_j)} static, {show_number(energy.wasted_j)} wasted "
        f"({energy.source}, {state}){host}"
    )


def _leg(leg: pb.StoryLeg) -> list[Text]:
    """What one replica did, as lines that fit a terminal."""
    headline = Text(f"choice {leg.choice_index}: ", style="dim")
    headline.append(f"{leg.replica_id} lane {leg.lane}", "bold not dim").append(f"  life {leg.epoch}")
    if leg.loss:
        headline.append(f"  replica {leg.loss}", "red not dim")
    lines = [f"submitted after {leg.submitted_ms:.1f} ms"]
    if leg.output_tokens:
        last_offset = leg.first_offset + leg.output_tokens - 1
        lines[0] += (
            f", tokens {leg.first_offset} to {last_offset} "
            f"from {leg.first_token_ms:.1f} to {leg.last_token_ms:.1f} ms"
        )
    if leg.batches.steps:
        mates = leg.batches
        lines.append(
            f"{mates.steps} steps with {mates.min} to {mates.max} sequences in the batch, half of them with "
            f"{mates.median} or fewer"
            if mates.min != mates.max
            else f"{mates.steps} steps with {mates.min} in the batch"
        )
    if leg.HasField("energy"):
        energy = leg.energy
        lines[-1] += f"; {show_number(energy.prefill_j)} J prefill, {show_number(energy.decode_j)} J decode"
    if leg.HasField("trail"):
        lines += _trail(leg.trail)
    return [headline, *(Text(f"  {line}") for line in lines)]


def _trail(trail: StepTrail) -> list[str]:
    """By the numbers that the replica's log has, too."""
    lines = [
        f"steps {trail.first_step} to {trail.last_step} of its engine: "
        f"{trail.prefill_steps} of prefill, {trail.decode_steps} of decode"
    ]
    if trail.HasField("longest_gap"):
        gap = trail.longest_gap
        lines.append(f"longest gap between tokens {gap.duration_us / 1e3:.1f} ms, ended by step {gap.step}")
    return lines


def _why_chosen(leg: pb.StoryLeg) -> str:
    choice = leg.choice
    count = len(choice.candidates)
    return (
        f"chosen of {count} {'lane' if count == 1 else 'lanes'}, policy {choice.policy}: "
        f"{REASONS.get(choice.reason, choice.reason)}; "
        f"objective {choice.target_ttft_ms:g} ms to the first token, {choice.target_tpot_ms:g} ms each "
        f"later, {choice.expected_tokens} tokens expected"
    )


def _candidates(choice: pb.StoryChoice) -> RenderableType:
    """Predicted milliseconds and added joules of each lane that could be had; `age`: of its load, in ms."""
    table = new_table(
        "", "candidate", ">lane", ">busy", ">cached", ">TTFT", ">TPOT", ">+J", ">age", "notes", wraps=True
    )
    for one in choice.candidates:
        table.add_row(
            "→" if one.is_chosen else "",
            one.replica_id,
            str(one.lane),
            str(one.requests),
            str(one.cached_tokens),
            f"{one.ttft_ms:.1f}",
            f"{one.tpot_ms:.2f}",
            show_number(one.added_j if one.HasField("added_j") else None),
            f"{one.snapshot_age_ms:.0f}",
            ", ".join(_notes(one)),
        )
    return table


def _notes(one: pb.StoryCandidate) -> list[str]:
    notes = {
        "in time": one.is_in_time,
        "hot": one.is_hot,
        "short of KV": not one.has_kv,
        "session": one.is_session,
    }
    return [note for note, holds in notes.items() if holds]
