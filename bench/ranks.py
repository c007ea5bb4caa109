"""`python -m bench ranks`: the same cores as one rank or several, in turn, on the same prompts.

The engines of all splits are loaded; those that do not run sleep. A ratio is the median over the rounds of
output tokens a second over the first split's in the same round, so that the drift of the machine cancels.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.engine import EngineSetup, EngineUnderTest
from bench.rows import SEED, checkpoint_shape, make_workload
from bench.suites import finish, measure_case
from bench.workload import Case

_SPLIT = re.compile(r"(solo)|(tp|ep|dispatch)([2-9])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How the cores are cut: `solo`, `tp2`, `ep2` (the shared layout), `dispatch2`; other degrees alike."""

    name: str
    kind: str
    num_ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksPlan:
    """What to compare; the first of `splits` is what the others are held against."""

    models: tuple[Path, ...]
    splits: tuple[Split, ...]
    cases: tuple[Case, ...]
    kernels: str
    threads: int
    rounds: int
    output_tokens: int


def parse_split(text: str) -> Split:
    """Raises ValueError for a name that is none."""
    found = _SPLIT.fullmatch(text)
    if found is None:
        raise ValueError(f"no split {text!r}; solo, or tp, ep or dispatch and a number of ranks, such as tp2")
    return Split(name=text, kind=found[2] or "solo", num_ranks=int(found[3] or 1))


def setup_of(split: Split, model: Path, plan: RanksPlan) -> EngineSetup:
    """An engine whose ranks share the threads of the plan. Raises ValueError if they cannot."""
    if plan.threads % split.num_ranks:
        raise ValueError(
            f"--threads {plan.threads} cannot be shared by the {split.num_ranks} ranks of {split.name}"
        )
    return EngineSetup(
        source=str(model),
        tensor=split.num_ranks if split.kind == "tp" else 1,
        expert=split.num_ranks if split.kind in ("ep", "dispatch") else 1,
        layout="dispatch" if split.kind == "dispatch" else "shared",
        threads=plan.threads // split.num_ranks,
        kernels=plan.kernels,
    )


async def run_ranks_suite(plan: RanksPlan, path: Path | None) -> None:
    """Measure every split on every case, round by round, and write one file."""
    rows: list[dict[str, object]] = []
    for model in plan.models:
        rows += await _measure_model(plan, model)
    finish("ranks", rows, path, ratios=ratios(rows))


async def _measure_model(plan: RanksPlan, model: Path) -> list[dict[str, object]]:
    rows = []
    shape = checkpoint_shape(model)
    async with AsyncExitStack() as stack:
        engines = {
            split.name: await stack.enter_async_context(EngineUnderTest(setup_of(split, model, plan)))
            for split in plan.splits
        }
        for case in plan.cases:
            for index in range(plan.rounds):
                workload = make_workload(
                    case.workload, shape, case.concurrency, plan.output_tokens, SEED + 2 * index
                )
                for name, engine in engines.items():
                    row = await measure_case(engine, model.name, workload)
                    rows.append(row | {"split": name, "round": index + 1})
    return rows


def ratios(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """By case: every other split over the one measured first. Rows of a round follow each other."""
    rates: dict[tuple[object, ...], dict[object, list[float]]] = {}
    for row in rows:
        rate = row["output_tok_s"]
        assert isinstance(rate, float)
        case = (row["model"], row["workload"], row["concurrency"])
        rates.setdefault(case, {}).setdefault(row["split"], []).append(rate)
    said = []
    for (model, workload, concurrency), by_split in rates.items():
        (first, base), *others = by_split.items()
        for split, measured in others:
            over = [round(one / other, 3) for one, other in zip(measured, base, strict=True)]
            said.append(
                {
                    "model": model,
                    "workload": workload,
                    "concurrency": concurrency,
                    "split": split,
                    "over": first,
                    "ratio": statistics.median(over),
                    "rounds": over,
                }
            )
    return said
