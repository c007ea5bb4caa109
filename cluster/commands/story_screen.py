"""The story of a request, for a person: a few sentences, a timeline, and a table per decision."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from cluster.commands.status_screen import new_table, show_number
from protos import wattline_cluster_pb2 as pb

GOOD_OUTCOMES = {"stop", "length"}
REASONS = {
    "policy": "it was the best by the model's policy",
    "session": "it is the session's own replica, and nearly as good as the best",
    "none_in_time": "no lane was expected to keep the objective: the soonest first token decided",
    "stale": "all loads were old: the less busy of two drawn by lot",
}


def render_story(story: pb.RequestStory) -> Group:
    """Everything that is known of it."""
    parts: list[RenderableType] = [_headline(story), *map(Text, _sentences(story)), _timeline(story)]
    for leg in story.legs:
        if leg.HasField("choice"):
            parts += [Text(_why_chosen(leg)), _candidates(leg.choice)]
    return Group(*parts)


def _headline(story: pb.RequestStory) -> Text:
    style = "green" if story.outcome in GOOD_OUTCOMES else "red"
    text = Text(f"{story.request_id}  {story.model}  tenant {story.tenant}  ")
    text.append(story.outcome, style=f"bold {style}")
    return text.append(f"  {story.age_s:,.0f} s ago  trace {story.trace_id}", style="dim")


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
    return (
        f"joules: {show_number(energy.prefill_j)} prefill + {show_number(energy.decode_j)} decode, "
        f"of them {show_number(energy.static_j)} static, {show_number(energy.wasted_j)} wasted "
        f"({energy.source}, {state})"
    )


TIMELINE = (
    "choice >at_ms replica >lane >from >tokens >first_ms >last_ms >batch >steps >prefill_J >decode_J end"
)


def _timeline(story: pb.RequestStory) -> RenderableType:
    """A line per replica that worked on it. `batch`: sequences per step, least/median/most."""
    if not story.legs:
        return Text("")
    table = new_table(*(name.replace("_", " ") for name in TIMELINE.split()))
    for leg in story.legs:
        mates, has_energy = leg.batches, leg.HasField("energy")
        table.add_row(
            str(leg.choice_index),
            f"{leg.submitted_ms:.1f}",
            f"{leg.replica_id}:{leg.epoch}",
            str(leg.lane),
            str(leg.first_offset),
            str(leg.output_tokens),
            f"{leg.first_token_ms:.1f}" if leg.HasField("first_token_ms") else "-",
            f"{leg.last_token_ms:.1f}" if leg.HasField("last_token_ms") else "-",
            f"{mates.min}/{mates.median}/{mates.max}" if mates.steps else "-",
            str(mates.steps),
            show_number(leg.energy.prefill_j if has_energy else None),
            show_number(leg.energy.decode_j if has_energy else None),
            f"[red]replica {leg.loss}[/]" if leg.loss else "",
        )
    return table


def _why_chosen(leg: pb.StoryLeg) -> str:
    choice = leg.choice
    return (
        f"{leg.replica_id} lane {leg.lane} of {len(choice.candidates)}, policy {choice.policy}: "
        f"{REASONS.get(choice.reason, choice.reason)}; objective {choice.target_ttft_ms:g} ms to the first "
        f"token, {choice.target_tpot_ms:g} ms each, {choice.expected_tokens} tokens expected"
    )


def _candidates(choice: pb.StoryChoice) -> RenderableType:
    table = new_table(
        "", "candidate", ">lane", ">busy", ">cached", ">TTFT ms", ">TPOT ms", ">added J", ">age ms", "notes"
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
            show_number(one.added_j),
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
