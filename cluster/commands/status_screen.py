"""Tables of what runs and what it draws, for `status`, `up` and `demo`."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.commands.event_line import describe_event
from cluster.replies import Final, ModelState, ReplicaState, RouterState

SHOWN_EVENTS = 3
STATE_STYLES = {"ready": "green", "draining": "yellow", "stalled": "red"}


def render_models(state: RouterState) -> Group:
    """A line per model, then a line per replica, then what happened to models that are short of them."""
    models = new_table("model", "engine", "ready", *RIGHT_OF_MODELS, "source")
    replicas = new_table("replica", "state", "ranks (pid)", *RIGHT_OF_REPLICAS)
    for model in state.models:
        models.add_row(*_model_row(model))
        for replica in model.replicas:
            replicas.add_row(*_replica_row(replica))
    parts: list[Table | Text] = [models]
    if any(model.replicas for model in state.models):
        parts += [Text(""), replicas]
    if told := _told(state):
        parts += [Text(""), *told]
    return Group(*parts)


def _told(state: RouterState) -> list[Text]:
    short = {model.name for model in state.models if model.num_ready < model.min_replicas}
    return [describe_event(event) for event in state.events if event.model in short][:SHOWN_EVENTS]


RIGHT_OF_MODELS = (">active", ">wait", ">tok/s", ">J/out")
RIGHT_OF_REPLICAS = (">run", ">KV", ">step ms", ">W")


def new_table(*columns: str, title: str = "", wraps: bool = False) -> Table:
    """Columns whose name starts with > are aligned to the right. `wraps`: the last may take more lines."""
    table = Table(
        box=SIMPLE_HEAD,
        title=title or None,
        title_justify="left",
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    for column in columns:
        name = column.removeprefix(">")
        table.add_column(name, justify="left" if name == column else "right", no_wrap=True)
    table.columns[-1].no_wrap = not wraps
    return table


def _model_row(model: ModelState) -> tuple[str, ...]:
    engine = ""
    if model.replicas:
        one = model.replicas[0]
        engine = f"tp{one.tensor_parallel} ep{one.expert_parallel} {one.device}"
    style = "green" if model.num_ready >= model.min_replicas else "yellow"
    return (
        model.name,
        engine,
        f"[{style}]{model.num_ready}/{model.min_replicas}",
        str(model.active_requests),
        str(model.waiting_requests),
        f"{model.output_tokens_per_s:,.1f}",
        show_number(model.joules_per_output_token),
        model.energy_source,
    )


def _replica_row(replica: ReplicaState) -> tuple[str, ...]:
    style = STATE_STYLES.get(replica.state, "red")
    return (
        replica.replica_id,
        f"[{style}]{replica.state}",
        " ".join(str(rank.pid) for rank in replica.ranks),
        str(replica.running),
        f"{100 - 100 * replica.free_blocks / max(1, replica.total_blocks):.0f}%",
        show_step(replica.step_ms),
        "-" if replica.power_w is None else f"{replica.power_w:.0f}",
    )


def render_answers(answers: list[tuple[str, Final]]) -> Table:
    """What each answer cost."""
    columns = ("model", ">in", ">out", ">J", ">J/out", ">J/tok", "source", "final")
    table = new_table(*columns, title="What each answer took: tokens and joules")
    for model, final in answers:
        energy = final.energy
        table.add_row(
            model,
            str(final.usage.prompt_tokens),
            str(final.usage.completion_tokens),
            show_number(energy.total_j),
            show_number(energy.joules_per_output_token),
            show_number(energy.joules_per_total_token),
            energy.source or "unknown",
            "yes" if energy.is_final else "no",
        )
    return table


def describe_cost(final: Final) -> str:
    """One line under an answer. Example: `12 tokens in 0.31 s, 2.1 J (0.175 J/token, model_table)`."""
    tokens = f"{final.usage.completion_tokens} tokens in {final.timing.total_ms / 1000:.2f} s"
    if final.resumed_at:
        tokens += f" (moved to another replica at {', '.join(map(str, final.resumed_at))})"
    energy = final.energy
    if energy.total_j is None:
        return f"{tokens}, energy unknown"
    per_token = show_number(energy.joules_per_output_token)
    state = "" if energy.is_final else ", provisional"
    return f"{tokens}, {show_number(energy.total_j)} J ({per_token} J/token, {energy.source}{state})"


def show_step(step_ms: float) -> str:
    """A dash until there was a step."""
    return f"{step_ms:.1f}" if step_ms else "-"


def show_number(value: float | None) -> str:
    """Three significant digits, or all before the point; a dash where nothing is known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
