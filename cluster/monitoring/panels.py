"""The panels of the Grafana dashboard: what each asks Prometheus, its unit, what it shows. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = 'model=~"$model"'
PROMPT, CACHED = 'kind="prompt"', 'kind="cached"'
REQUEST, REST = 'ledger="request"', 'ledger!="request"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One PromQL expression and how its series are named."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`unit` is Grafana's name of it, `text` what a reader sees behind the panel's (i).

    `stacks` draws areas that add up, but for the series `line`. `is_total` draws a bar per series in place of
    its course.
    """

    title: str
    unit: str
    text: str
    queries: tuple[Query, ...]
    stacks: bool = False
    line: str = ""
    is_total: bool = False


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


def _energy_by(labels: str, ledger: str) -> str:
    """Routers a replica dials show the same joules: they are joined by max."""
    rate = _rate("wattline_energy_joules_total", ledger)
    return f"sum by ({labels}) (max by (model, source, ledger, phase, component, tenant) ({rate}))"


EXPERTS = "Experts"
"""The row that stays empty where no model has experts."""
EXPERT_RATE = _rate("wattline_expert_tokens_total")

ROWS: dict[str, tuple[Panel, ...]] = {
    "Energy": (
        Panel(
            title="Where the power goes",
            unit="watt",
            text=(
                "What the ledgers divided of the meters, by what it was for: prefill + decode + idle + "
                "unattributed = meter, the line. Where hosts are metered too, their CPUs and memory stand on "
                "top, beyond the line. In brackets where the joules come from: counter is measured, tdp and "
                "model_* are estimates."
            ),
            stacks=True,
            line="meter",
            queries=(
                Query(expr=_energy_by("phase, source", REQUEST), legend="{{phase}} ({{source}})"),
                Query(expr=_energy_by("ledger, source", REST), legend="{{ledger}} ({{source}})"),
                Query(
                    expr=(
                        "sum by (ledger) (max by (model, source, ledger) "
                        f"({_rate('wattline_host_energy_joules_total')}))"
                    ),
                    legend="host, {{ledger}}",
                ),
                Query(
                    expr=(f"sum(max by (model, source) ({_rate('wattline_energy_meter_joules_total')}))"),
                    legend="meter",
                ),
            ),
        ),
        Panel(
            title="Joules per token",
            unit="joule",
            text=(
                "Joules of requests by the tokens of their answers, and by all their tokens. Idle joules are "
                "in neither."
            ),
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
            text="Joules of the requests of each tenant in the time shown, prefill and decode.",
            is_total=True,
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
            text=(
                "Parts of a model's metered energy. Idle: drawn for nobody, fewer replicas would save it. "
                "Unattributed: lost step records or work that is not ours; above 5 % an alert fires."
            ),
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
            text=(
                "Only models with an `slo`. 1 % is the budget; failed answers count as missed, cancelled "
                "ones do not count."
            ),
            queries=(
                Query(expr=f"model:wattline_slo_missed:ratio5m{{{MODEL}}}", legend="{{model}} 5 min"),
                Query(expr=f"model:wattline_slo_missed:ratio1h{{{MODEL}}}", legend="{{model}} 1 h"),
            ),
        ),
        Panel(
            title="Time to first token",
            unit="s",
            text="From arrival to the first token of the answer: half, and 99 of 100, are faster.",
            queries=_quantiles("wattline_time_to_first_token_seconds"),
        ),
        Panel(
            title="Time per output token",
            unit="s",
            text="Mean time of an answer's later tokens: half, and 99 of 100 answers, are faster.",
            queries=_quantiles("wattline_time_per_output_token_seconds"),
        ),
        Panel(
            title="Tokens",
            unit="suffix: tok/s",
            text=(
                "prompt: read, cached ones included; cached: found in the prefix cache; output: sent; "
                "wasted: computed, and of no use to anybody."
            ),
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
            text="By gRPC code: RESOURCE_EXHAUSTED was refused, UNAVAILABLE found no replica.",
            stacks=True,
            queries=(
                Query(
                    expr=f"sum by (code) ({_rate('wattline_requests_total')})",
                    legend="{{code}}",
                ),
            ),
        ),
        Panel(
            title="Queue",
            unit="s",
            text="From arrival to the first step that worked on a request, in router and replica.",
            queries=_quantiles("wattline_queue_seconds"),
        ),
    ),
    "Engines": (
        Panel(
            title="Batch and queue",
            unit="short",
            text="Requests that a replica's steps work on together, and those that wait there.",
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
            text="Part of the cache of keys and values that requests hold; at 100 % new ones wait.",
            queries=(
                Query(
                    expr=f"max by (model, replica) (wattline_kv_usage_ratio{{{MODEL}}})", legend="{{replica}}"
                ),
            ),
        ),
        Panel(
            title="Step time",
            unit="s",
            text="99 of 100 steps are faster. Each running request gets a token a step.",
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
            text="What the devices of each replica draw; a gap where no meter speaks.",
            queries=(
                Query(
                    expr=f"max by (model, replica) (wattline_power_watts{{{MODEL}}})", legend="{{replica}}"
                ),
            ),
        ),
        Panel(
            title="Prompt tokens from the prefix cache",
            unit="percentunit",
            text="Part of the prompt tokens whose keys and values were there: they cost next to nothing.",
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
            text=(
                "Attached replicas by state, and how many should be ready. What happened to each, and why, "
                "is on the router's own page /dash."
            ),
            queries=(
                Query(
                    expr=f"max by (model, state) (wattline_replicas{{{MODEL}}})", legend="{{model}} {{state}}"
                ),
                Query(
                    expr=f"max by (model) (wattline_replicas_wanted{{{MODEL}}})", legend="{{model}} wanted"
                ),
            ),
        ),
    ),
    EXPERTS: (
        Panel(
            title="Imbalance of ranks",
            unit="suffix:×",
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
            unit="suffix:×",
            text="Load of the busiest rank over the mean in the five layers where it is highest.",
            queries=(
                Query(
                    expr=f"topk(5, max by (model, layer) (wattline_expert_imbalance{{{MODEL}}}))",
                    legend="{{model}} layer {{layer}}",
                ),
            ),
        ),
        Panel(
            title="Hottest experts",
            unit="suffix:×",
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
