"""What a comparison prints: a line per run, a table per model, a verdict per engine of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from bench.peers.comparison import Fields, Verdict
from bench.workload import Workload

RATIO = "_ratio"
WIDTH_WITHOUT_TERMINAL = 150

console = Console()
if not console.is_terminal:
    console.width = WIDTH_WITHOUT_TERMINAL


def show_sample(model: str, system: str, workload: Workload, index: int, fields: Fields) -> None:
    console.print(
        f"{model} {workload.name}:{workload.concurrency} round {index + 1} {system}: "
        f"{fields['output_tok_s']:.1f} out tok/s, TTFT {fields['ttft_ms_p50']:.0f} ms, "
        f"TPOT {fields['tpot_ms_p50']:.2f} ms",
        highlight=False,
    )


def show_tables(rows: Sequence[Mapping[str, object]], verdicts: Mapping[str, Sequence[Verdict]]) -> None:
    """One table per model, in the order of the rows, and what it comes to."""
    for model, some in verdicts.items():
        mine = [row for row in rows if row["model"] == model]
        console.print(_table(model, mine))
        for verdict in some:
            console.print(_verdict(model, verdict), highlight=False)


def _table(model: str, rows: Sequence[Mapping[str, object]]) -> Table:
    ratios = list(dict.fromkeys(key for row in rows for key in row if key.endswith(RATIO)))
    table = Table(title=f"{model}: medians over the rounds; × is our output tok/s over theirs")
    table.add_column("load")
    table.add_column("system")
    titles = ("out tok/s", "TTFT p50/p99 ms", "TPOT p50/p99 ms", "p99/calm", "J/token")
    for title in (*titles, *(f"{key.removesuffix(RATIO)} ×" for key in ratios), "first tokens"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            f"{row['workload']}:{row['concurrency']}",
            str(row["system"]),
            _number(row["output_tok_s"]),
            f"{_number(row['ttft_ms_p50'])}/{_number(row['ttft_ms_p99'])}",
            f"{_number(row['tpot_ms_p50'])}/{_number(row['tpot_ms_p99'])}",
            _number(row.get("tpot_p99_over_undisturbed")),
            _number(row["joules_per_output_token"]),
            *(_number(row[key]) for key in ratios),
            _heads(row["heads"]),
        )
    return table


def _number(value: object) -> str:
    """Three digits, the whole part never rounded away."""
    if value is None:
        return ""
    assert isinstance(value, float)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _heads(value: object) -> str:
    assert isinstance(value, Mapping)
    if not value["near_ties"] + value["different"]:
        return "same"
    ties = f"{value['near_ties']} ties, " if value["near_ties"] else ""
    return f"{ties}{value['different']} differ (gap {value['widest_gap']:.1g})"


def _verdict(model: str, verdict: Verdict) -> str:
    cases = ", ".join(
        f"{one.case.workload}:{one.case.concurrency} {one.ratio:.2f} ({one.best_peer})"
        for one in verdict.cases
    )
    ttft = {"with": verdict.prefix_ttft_over_cached, "without": verdict.prefix_ttft_over_uncached}
    prefix = "".join(
        f"; shared-prefix TTFT {value:.2f} of the quickest peer {kind} prefix cache"
        for kind, value in ttft.items()
        if value is not None
    )
    return (
        f"[bold]{model}: {verdict.system} over the best peer: geometric mean {verdict.geometric_mean:.2f}, "
        f"least {verdict.least_ratio:.2f}[/] ({cases}){prefix}"
    )
