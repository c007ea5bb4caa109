"""What `wattline top` shows: per model its numbers, where its power goes, and lines of the last seconds.

Replicas and requests follow. Pure but for the seconds it remembers. Unknown is a dash.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cluster.commands.event_line import EVENT_STYLES, describe_event, show_duration
from cluster.commands.status_screen import STATE_STYLES, new_table, show_number, show_step
from cluster.replies import (
    ExpertState,
    FleetEvent,
    HostState,
    Latency,
    LedgerState,
    ModelState,
    RequestState,
    RouterState,
)
from replicas.energy.meter import MEASURED

HISTORY_POINTS = 60
BARS = "▁▂▃▄▅▆▇█"
NARROW = 80
"""Columns of the smallest terminal that everything fits; bars and lines take what a wider one has more."""
BAR_CELLS = (12, 60)
LINE_CELLS = (23, HISTORY_POINTS)
"""The fewest, and the most."""
PARTS = (
    ("prefill", "blue"),
    ("decode", "yellow"),
    ("idle", "bright_black"),
    ("unattributed", "magenta"),
)
LEAST_REQUESTS = 3
LINES_OF_MODEL = 7
LINES_OF_HEADER = 2
SHOWN_EVENTS = 3
FRESH_EVENT_S = 60.0
WIDTHS = {"tok/s": 8, "TTFT p50/p95": 13, "TPOT p50/p95": 13, "TTFT": 6, "in time": 7, "J": 7, "J/out": 7}
WIDTHS |= {"J/tok": 7, "step ms": 7, "W": 6, "ago": 3}
"""Columns that are as wide now as in the next second, whatever the number."""
LEDGER_UNITS = (("J", 1e3), ("kJ", 1e6), ("MJ", 1e9), ("GJ", 1e12))
"""In millijoules."""


@dataclass(slots=True)
class Lines:
    """The last numbers of one model, a second apart."""

    tokens_per_s: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY_POINTS))
    power_w: deque[float | None] = field(default_factory=lambda: deque(maxlen=HISTORY_POINTS))


class TopScreen:
    """Mutable: remembers the last state and a minute of lines. `add` a state, then `render`."""

    def __init__(self) -> None:
        self._state: RouterState | None = None
        self._lines: dict[str, Lines] = {}
        self._lost = ""

    def add(self, state: RouterState) -> None:
        self._state = state
        self._lost = ""
        for model in state.models:
            lines = self._lines.setdefault(model.name, Lines())
            lines.tokens_per_s.append(model.output_tokens_per_s)
            lines.power_w.append(model.power.meter_w if model.power else None)

    def note_lost(self, reason: str) -> None:
        """The router did not answer; the numbers on the screen are old."""
        self._lost = reason

    def render(self, *, width: int = NARROW, height: int = 0, num_requests: int = LEAST_REQUESTS) -> Group:
        """`height` 0: as many lines as it takes, with `num_requests` requests."""
        state = self._state
        if state is None:
            return Group(Text("no answer yet"))
        events = state.events[:SHOWN_EVENTS]
        gap = [Text("")]
        if height:
            taken = _lines_taken(state)
            if taken + len(state.models) + 2 + len(events) + LEAST_REQUESTS > height:
                # Numbers come first, and a replica that just went.
                events, gap = tuple(event for event in events[:1] if _is_fresh_loss(event)), []
            num_requests = max(1, height - taken - len(gap) * (len(state.models) + 2) - len(events))
        parts: list[RenderableType] = [self._headline(state, is_live=height > 0)]
        for model in state.models:
            parts += [*gap, Rule(_title(model), align="left", style="bright_black")]
            parts += [_numbers(model), *_energy(model, width=width)]
            if model.host is not None:
                parts.append(describe_host(model.host))
            parts.append(self._line_row(model, width=width))
            if model.experts is not None:
                parts.append(describe_experts(model.experts))
        parts += [*gap, _replicas(state.models), *map(_event_line, events)]
        parts += [*gap, _requests(state.last_requests[:num_requests])]
        return Group(*parts)

    def _headline(self, state: RouterState, *, is_live: bool) -> Text:
        text = Text("wattline", style="bold")
        text.append(
            f"  {state.router_id} {state.version}  up {show_duration(state.uptime_s)}  ", "bright_black"
        )
        if self._lost:
            text.append(f"● reconnecting: {self._lost}", "yellow")
        else:
            text.append("● live", "green")
            text.append("   q quits" if is_live else "", "bright_black")
        return text

    def _line_row(self, model: ModelState, *, width: int) -> Text:
        """A line of tokens/s and one of watts, each with the highest that it shows."""
        lines = self._lines[model.name]
        cells = _cells(LINE_CELLS, (width - NARROW) // 2)
        text = Text(style="bright_black")
        for label, values, style in (
            ("tok/s ", lines.tokens_per_s, "green"),
            ("  W ", lines.power_w, "yellow"),
        ):
            shown = [value for value in list(values)[-cells:] if value is not None]
            text.append(label)
            text.append(draw_line(values, width=cells), style)
            text.append(f" max {show_number(max(shown, default=None))}")
        return text


def _lines_taken(state: RouterState) -> int:
    """All but requests, events and gaps."""
    num_lines = 1 + 2 * LINES_OF_HEADER
    for model in state.models:
        extras = (model.experts is not None) + (model.host is not None)
        num_lines += LINES_OF_MODEL + extras + len(model.replicas)
    return num_lines


def _cells(bounds: tuple[int, int], spare: int) -> int:
    least, most = bounds
    return max(least, min(most, least + spare))


def _event_line(event: FleetEvent) -> Text:
    """One line, whatever the reason: lines are counted here."""
    line = describe_event(event)
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _is_fresh_loss(event: FleetEvent) -> bool:
    return event.age_s < FRESH_EVENT_S and event.kind in EVENT_STYLES


def _steady_table(*columns: str) -> Table:
    table = new_table(*columns)
    for column in table.columns:
        column.min_width = WIDTHS.get(str(column.header))
    return table


def _numbers(model: ModelState) -> Table:
    columns = ("tok/s", "TTFT p50/p95", "TPOT p50/p95", "in time", "J/out", "J/tok", "active", "wait")
    table = _steady_table(*(f">{column}" for column in columns))
    answered = model.slo_met + model.slo_missed
    table.add_row(
        f"{model.output_tokens_per_s:,.1f}",
        show_latency(model.ttft_ms),
        show_latency(model.tpot_ms),
        f"{100 * model.slo_met / answered:.3g}%" if answered else "-",
        show_number(model.joules_per_output_token),
        show_number(model.joules_per_total_token),
        str(model.active_requests),
        str(model.waiting_requests),
    )
    return table


def _energy(model: ModelState, *, width: int) -> list[Text]:
    """Power as a bar of its parts, and the ledger as a sum."""
    if model.power is None or not model.ledger:
        return [Text("energy unknown: no meter has spoken", style="bright_black")]
    watts = {name: getattr(model.power, f"{name}_w") for name, _ in PARTS}
    bar = Text(f"{show_number(model.power.meter_w)} W ".rjust(8), style="bold", no_wrap=True)
    shares = share_cells(watts.values(), _cells(BAR_CELLS, width - NARROW))
    for (_, style), cells in zip(PARTS, shares, strict=True):
        bar.append("█" * cells, style)
    for name, style in PARTS:
        bar.append(f" {name} ", "bright_black")
        bar.append(show_number(watts[name]), style)
    return [bar, describe_ledger(_ledger_of(model))]


def _ledger_of(model: ModelState) -> LedgerState:
    """That of the source the last joules came from."""
    return next((one for one in model.ledger if one.source == model.energy_source), model.ledger[0])


def _title(model: ModelState) -> Text:
    text = Text(model.name, style="bold")
    is_short = model.num_ready < model.min_replicas
    ready = f"  {model.num_ready} of {model.min_replicas} ready"
    text.append(ready, "not bold yellow" if is_short else "not bold bright_black")
    if model.ledger:
        ledger = _ledger_of(model)
        source = describe_source(ledger.source, ledger.confidence_factor)
        text.append(f"  {source}", "not bold green" if source.startswith("measured") else "not bold yellow")
    return text


def describe_ledger(ledger: LedgerState) -> Text:
    """The sum as one line. Example: `1.200 + 3.400 + 0.500 + 0.000 = 5.100 J`.

    Beyond 1 MJ it is rounded so that what is written adds up, too.
    """
    parts = (ledger.prefill_mj, ledger.decode_mj, ledger.idle_mj, ledger.unattributed_mj)
    is_conserved = sum(parts) == ledger.meter_mj
    unit, in_mj = next((one for one in LEDGER_UNITS if ledger.meter_mj < 1e6 * one[1]), LEDGER_UNITS[-1])
    thousandths = share_cells(parts, round(sum(parts) * 1e3 / in_mj))
    text = Text("ledger ", style="bright_black", no_wrap=True)
    text.append(" + ".join(f"{part / 1e3:,.3f}" for part in thousandths))
    sign, style = ("=", "bold") if is_conserved else ("≠", "red")
    text.append(f" {sign} {ledger.meter_mj / in_mj:,.3f} {unit}", style)
    return text


def describe_host(host: HostState) -> Text:
    """Example: `host 42.1 W beside it  0.400 for requests + 0.100 rest = 0.500 J`."""
    text = Text("host ", style="bright_black", overflow="ellipsis", no_wrap=True)
    text.append(f"{show_number(host.power_w)} W", "cyan")
    text.append(" beside it  ")
    text.append(f"{host.requests_mj / 1e3:,.3f} for requests + {host.rest_mj / 1e3:,.3f} rest")
    text.append(f" = {host.meter_mj / 1e3:,.3f} J", "bold not bright_black")
    return text


def describe_experts(experts: ExpertState) -> Text:
    """Example: `experts 5.92× hottest (layer 8 expert 31)  ranks 1.06×, 1.34× without copies`."""
    text = Text("experts ", style="bright_black", overflow="ellipsis", no_wrap=True)
    text.append(f"{experts.hottest_load:.2f}×", "bold")
    text.append(f" hottest (layer {experts.hottest_layer} expert {experts.hottest_expert})")
    if experts.imbalance is not None:
        text.append("  ranks ")
        text.append(f"{experts.imbalance:.2f}×", "bold")
        if experts.num_copies and experts.imbalance_without_copies is not None:
            text.append(f", {experts.imbalance_without_copies:.2f}× without copies")
    return text


def describe_source(source: str, confidence_factor: float) -> str:
    """Example: `estimated (tdp, ×2)`."""
    kind = "simulated" if source == "fake" else "measured" if source in MEASURED else "estimated"
    within = f", ×{confidence_factor:.3g}" if confidence_factor > 1.0 else ""
    return f"{kind} ({source}{within})"


def _replicas(models: Iterable[ModelState]) -> Table:
    table = _steady_table("replica", "state", ">ranks", ">run", ">wait", ">KV", ">step ms", ">W")
    for model in models:
        for replica in model.replicas:
            style = STATE_STYLES.get(replica.state, "red")
            table.add_row(
                replica.replica_id,
                f"[{style}]{replica.state}",
                str(len(replica.ranks)),
                str(replica.running),
                str(replica.waiting),
                f"{100 - 100 * replica.free_blocks / max(1, replica.total_blocks):.0f}%",
                show_step(replica.step_ms),
                show_number(replica.power_w),
            )
    return table


def _requests(requests: Sequence[RequestState]) -> RenderableType:
    if not requests:
        return Text('Nothing has been asked yet: wattline chat "Who are you?"', style="bright_black")
    table = _steady_table("request", "model", ">ago", ">in", ">out", ">TTFT", ">J", ">J/out", "outcome")
    for request in requests:
        joules = None if request.energy_mj is None else request.energy_mj / 1e3
        table.add_row(
            request.request_id[:8],
            request.model,
            show_duration(request.age_s),
            str(request.prompt_tokens),
            str(request.output_tokens),
            show_ms(request.ttft_ms),
            f"{show_number(joules)}{'' if request.is_final else '~'}",
            show_number(joules / request.output_tokens if joules and request.output_tokens else None),
            request.outcome,
        )
    return table


def show_latency(latency: Latency | None) -> str:
    return "-" if latency is None else f"{show_ms(latency.p50)}/{show_ms(latency.p95)}"


def show_ms(value: float | None) -> str:
    """Example: `31.2ms`, `1.4s`."""
    if value is None:
        return "-"
    return f"{value / 1e3:.3g}s" if value >= 1000 else f"{value:.3g}ms"


def draw_line(values: Iterable[float | None], *, width: int) -> str:
    """The last values as bars, the highest as a full one; a gap where nothing is known."""
    last = list(values)[-width:]
    highest = max((value for value in last if value is not None), default=0.0) or 1.0
    return "".join(
        " " if value is None else BARS[int(value / highest * (len(BARS) - 1) + 0.5)] for value in last
    )


def share_cells(values: Iterable[float], num_cells: int) -> list[int]:
    """Divide cells in proportion: the largest remainders get what rounding down left. They add up."""
    exact = list(values)
    whole = sum(exact)
    if whole <= 0.0:
        return [0] * len(exact)
    shares = [value * num_cells / whole for value in exact]
    cells = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: cells[index] - shares[index])
    for index in by_remainder[: num_cells - sum(cells)]:
        cells[index] += 1
    return cells
