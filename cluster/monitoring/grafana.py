"""The Grafana dashboard, made of a table of panels. Pure: plain data in, JSON-ready data out.

Format: dashboard JSON of Grafana 10 and later (`schemaVersion` 38); the data source is a variable.
"""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = 24
"""Width of Grafana's grid."""
PANEL_WIDTH, PANEL_HEIGHT = 8, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
MODEL = 'model=~"$model"'
PROMPT, CACHED = 'kind="prompt"', 'kind="cached"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One PromQL expression and how its series are named."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`unit` is Grafana's name of it; `stacks` draws areas that add up."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str = ""
    stacks: bool = False


def _rate(metric: str, *matchers: str) -> str:
    return f"rate({metric}{{{','.join((MODEL, *matchers))}}}[$__rate_interval])"


def _quantiles(metric: str) -> tuple[Query, ...]:
    return tuple(
        Query(
            expr=f"histogram_quantile({q}, sum by (model, le) ({_rate(f'{metric}_bucket')}))",
            legend=f"{{{{model}}}} p{q * 100:g}",
        )
        for q in (0.5, 0.99)
    )


EXPERTS = "Experts"
"""The row that stays empty where no model has experts."""
EXPERT_RATE = _rate("wattline_expert_tokens_total")

ROWS: dict[str, tuple[Panel, ...]] = {
    "Energy": (
        Panel(
            title="Where the power goes",
            unit="watt",
            text=(
                "What the ledgers divided of the meters: the areas add up to the meter. Where hosts are "
                "metered too, their CPUs and memory stand on top."
            ),
            stacks=True,
            queries=(
                Query(
                    expr=(
                        "sum by (ledger, phase) (max by (model, source, ledger, phase, component, tenant) "
                        f"({_rate('wattline_energy_joules_total')}))"
                    ),
                    legend="{{ledger}} {{phase}}",
                ),
                Query(
                    expr=(
                        "sum by (ledger) (max by (model, source, ledger) "
                        f"({_rate('wattline_host_energy_joules_total')}))"
                    ),
                    legend="host {{ledger}}",
                ),
            ),
        ),
        Panel(
            title="Joules per token",
            unit="joule",
            text="Energy of requests by their output tokens, and by all their tokens.",
            queries=(
                Query(
                    expr=f"model:wattline_joules_per_output_token:ratio5m{{{MODEL}}}",
                    legend="{{model}} per output token ({{source}})",
                ),
                Query(
                    expr=f"model:wattline_joules_per_token:ratio5m{{{MODEL}}}",
                    legend="{{model}} per token ({{source}})",
                ),
            ),
        ),
        Panel(
            title="Power by tenant",
            unit="watt",
            text="What the requests of each tenant draw, prefill and decode.",
            stacks=True,
            queries=(
                Query(
                    expr=f"sum by (tenant, source) (tenant:wattline_energy_watts:rate5m{{{MODEL}}})",
                    legend="{{tenant}} ({{source}})",
                ),
            ),
        ),
        Panel(
            title="Energy of tenants",
            unit="joule",
            text="In the time shown.",
            queries=(
                Query(
                    expr=(
                        "sum by (tenant, source) (max by (model, source, ledger, phase, component, tenant) "
                        f'(increase(wattline_energy_joules_total{{{MODEL},ledger="request"}}[$__range])))'
                    ),
                    legend="{{tenant}} ({{source}})",
                ),
            ),
        ),
        Panel(
            title="Idle and unattributed",
            unit="percentunit",
            queries=(
                Query(expr=f"model:wattline_idle_energy:ratio5m{{{MODEL}}}", legend="{{model}} idle"),
                Query(
                    expr=f"model:wattline_unattributed_energy:ratio5m{{{MODEL}}}",
                    legend="{{model}} unattributed",
                ),
            ),
        ),
    ),
    "Service": (
        Panel(
            title="Answers that missed the objective",
            unit="percentunit",
            text="Only models with an `slo`. 1 % is the budget.",
            queries=(
                Query(expr=f"model:wattline_slo_missed:ratio5m{{{MODEL}}}", legend="{{model}} 5 min"),
                Query(expr=f"model:wattline_slo_missed:ratio1h{{{MODEL}}}", legend="{{model}} 1 h"),
            ),
        ),
        Panel(
            title="Time to first token", unit="s", queries=_quantiles("wattline_time_to_first_token_seconds")
        ),
        Panel(
            title="Time per output token",
            unit="s",
            queries=_quantiles("wattline_time_per_output_token_seconds"),
        ),
        Panel(
            title="Tokens",
            unit="short",
            text="Tokens per second, by kind.",
            queries=(
                Query(
                    expr=f"sum by (model, kind) ({_rate('wattline_tokens_total')})",
                    legend="{{model}} {{kind}}",
                ),
            ),
        ),
        Panel(
            title="Requests by outcome",
            unit="reqps",
            stacks=True,
            queries=(
                Query(
                    expr=f"sum by (code) ({_rate('wattline_requests_total')})",
                    legend="{{code}}",
                ),
            ),
        ),
        Panel(title="Queue", unit="s", queries=_quantiles("wattline_queue_seconds")),
    ),
    "Engines": (
        Panel(
            title="Batch and queue",
            unit="short",
            queries=(
                Query(
                    expr=f"max by (model, replica) (wattline_batch_sequences{{{MODEL}}})",
                    legend="{{replica}} batch",
                ),
                Query(
                    expr=f"max by (model, replica) (wattline_waiting_sequences{{{MODEL}}})",
                    legend="{{replica}} waiting",
                ),
            ),
        ),
        Panel(
            title="KV cache in use",
            unit="percentunit",
            queries=(
                Query(
                    expr=f"max by (model, replica) (wattline_kv_usage_ratio{{{MODEL}}})", legend="{{replica}}"
                ),
            ),
        ),
        Panel(
            title="Step time",
            unit="s",
            queries=(
                Query(
                    expr=(
                        "histogram_quantile(0.99, sum by (replica, le) "
                        f"({_rate('wattline_step_seconds_bucket')}))"
                    ),
                    legend="{{replica}} p99",
                ),
            ),
        ),
        Panel(
            title="Power of replicas",
            unit="watt",
            queries=(
                Query(
                    expr=f"max by (model, replica) (wattline_power_watts{{{MODEL}}})", legend="{{replica}}"
                ),
            ),
        ),
        Panel(
            title="Prompt tokens from the prefix cache",
            unit="percentunit",
            queries=(
                Query(
                    expr=(
                        f"sum by (model) ({_rate('wattline_tokens_total', CACHED)}) / "
                        f"(sum by (model) ({_rate('wattline_tokens_total', PROMPT)}) > 0)"
                    ),
                    legend="{{model}}",
                ),
            ),
        ),
        Panel(
            title="Replicas",
            unit="short",
            queries=(
                Query(
                    expr=f"max by (model, state) (wattline_replicas{{{MODEL}}})", legend="{{model}} {{state}}"
                ),
            ),
        ),
    ),
    EXPERTS: (
        Panel(
            title="Imbalance of ranks",
            unit="short",
            text=(
                "Load of the busiest rank over the mean, mean of the layers: 1 is even. Without copies: had "
                "no hot expert a copy in a spare slot."
            ),
            queries=(
                Query(
                    expr=f"avg by (model, replica) (wattline_expert_imbalance{{{MODEL}}})",
                    legend="{{replica}} as placed",
                ),
                Query(
                    expr=f"avg by (model, replica) (wattline_expert_imbalance_without_copies{{{MODEL}}})",
                    legend="{{replica}} without copies",
                ),
            ),
        ),
        Panel(
            title="Most uneven layers",
            unit="short",
            queries=(
                Query(
                    expr=f"topk(5, max by (model, layer) (wattline_expert_imbalance{{{MODEL}}}))",
                    legend="{{model}} layer {{layer}}",
                ),
            ),
        ),
        Panel(
            title="Hottest experts",
            unit="short",
            text="Tokens of an expert over the mean of its layer's experts: 1 is an even share.",
            queries=(
                Query(
                    expr=(
                        f"topk(5, sum by (model, layer, expert) ({EXPERT_RATE}) "
                        "/ on (model, layer) group_left () "
                        f"(avg by (model, layer) (sum by (model, layer, expert) ({EXPERT_RATE})) > 0))"
                    ),
                    legend="{{model}} layer {{layer}} expert {{expert}}",
                ),
            ),
        ),
    ),
}
"""All panels, by the title of their row."""


def build_dashboard() -> dict[str, object]:
    """The dashboard, ready for `json.dumps` and Grafana's import."""
    panels: list[dict[str, object]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "type": "row",
                "id": len(panels) + 1,
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top},
            }
        )
        top += 1
        for index, panel in enumerate(row):
            below, column = divmod(index, COLUMNS // PANEL_WIDTH)
            position = {
                "h": PANEL_HEIGHT,
                "w": PANEL_WIDTH,
                "x": column * PANEL_WIDTH,
                "y": top + below * PANEL_HEIGHT,
            }
            panels.append(_panel(panel, number=len(panels) + 1, position=position))
        top += -(-len(row) // (COLUMNS // PANEL_WIDTH)) * PANEL_HEIGHT
    return {
        "uid": "wattline",
        "title": "Wattline",
        "tags": ["wattline", "llm", "energy"],
        "schemaVersion": 38,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource_variable(), _model_variable()]},
        "panels": panels,
    }


def _panel(panel: Panel, *, number: int, position: dict[str, int]) -> dict[str, object]:
    custom: dict[str, object] = {"fillOpacity": 60 if panel.stacks else 8, "showPoints": "never"}
    if panel.stacks:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "gridPos": position,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": custom},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _datasource_variable() -> dict[str, object]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _model_variable() -> dict[str, object]:
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(wattline_replicas, model)", "refId": "models"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }
