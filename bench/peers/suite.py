"""`python -m bench peers`: our engine and its peers in turn, round by round, on one machine."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.engine import EngineSetup, EngineUnderTest
from bench.peers.adapter import KV_CACHE_BYTES, PeerSetup
from bench.peers.agreement import ReferenceGap, compare_heads
from bench.peers.comparison import CaseResult, Verdict, judge, ratio
from bench.peers.process import PeerFailed, PeerProcess
from bench.peers.system import OurEngine, Sample, System, measure, measure_disturbed
from bench.peers.tables import console, show_sample, show_tables
from bench.record import write_results
from bench.rows import SEED, checkpoint_shape, identity, make_workload
from bench.workload import Case, Workload
from replicas.config import EngineLimits

WARM_UP_OUTPUT_TOKENS = 8
WARM_UP_SEED, CALM_SEED = SEED - 1, SEED + 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersPlan:
    """What to compare. `peers` maps names to interpreters; each of `kernels` is an engine of ours."""

    models: tuple[Path, ...]
    peers: dict[str, str]
    cases: tuple[Case, ...]
    kernels: tuple[str, ...]
    dtype: str
    threads: int
    tensor: int
    expert: int
    rounds: int
    output_tokens: int
    requests_per_stream: int
    converted: Path


@dataclass(slots=True)
class ModelComparison:
    """All systems on one model, and what came of it. A peer that fails goes to `failures`."""

    plan: PeersPlan
    model: Path
    systems: list[System] = field(default_factory=list)
    results: list[CaseResult] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)

    def workload(self, case: Case, seed: int, output_tokens: int) -> Workload:
        shape = checkpoint_shape(self.model)
        return make_workload(
            case.workload,
            shape,
            case.concurrency,
            output_tokens,
            seed,
            requests_per_stream=self.plan.requests_per_stream,
        )

    @property
    def context_tokens(self) -> int:
        """What the longest request of any case needs."""
        return max(
            self.workload(case, SEED, self.plan.output_tokens).context_tokens for case in self.plan.cases
        )

    def drop(self, name: str, error: PeerFailed) -> None:
        console.print(f"[red]left out[/] {error}", highlight=False)
        self.failures.append({"system": name, "model": self.model.name, "error": str(error)})
        self.systems = [one for one in self.systems if one.facts.name != name]


async def run_peers_suite(plan: PeersPlan, path: Path | None) -> None:
    """Measure every case of every model and write one file."""
    rows: list[dict[str, object]] = []
    failures: list[dict[str, str]] = []
    verdicts: dict[str, list[Verdict]] = {}
    for model in plan.models:
        comparison = ModelComparison(plan, model)
        async with _systems(comparison):
            for case in plan.cases:
                await _measure_case(comparison, case)
        rows += comparison.rows
        failures += comparison.failures
        verdicts[model.name] = judge(comparison.results)
    show_tables(rows, verdicts)
    summary = {name: [asdict(one) for one in some] for name, some in verdicts.items()}
    console.print(f"written to {write_results('peers', rows, path, summary=summary, failures=failures)}")


@asynccontextmanager
async def _systems(comparison: ModelComparison) -> AsyncIterator[None]:
    """Every engine of the plan, loaded, until the block ends."""
    plan = comparison.plan
    async with AsyncExitStack() as stack:
        for kernels in plan.kernels:
            setup = EngineSetup(
                source=str(comparison.model),
                tensor=plan.tensor,
                expert=plan.expert,
                threads=plan.threads // max(plan.tensor, plan.expert),
                dtype=plan.dtype,
                kernels=kernels,
                limits=EngineLimits(kv_cache_bytes=KV_CACHE_BYTES),
            )
            engine = await stack.enter_async_context(EngineUnderTest(setup))
            comparison.systems.append(OurEngine(engine, kernels))
        for name, python in plan.peers.items():
            peer = PeerProcess(_peer_setup(comparison, name), python)
            stack.push_async_callback(peer.stop)
            console.print(f"starting {name}")
            try:
                await peer.start()
            except PeerFailed as error:
                comparison.drop(name, error)
            else:
                comparison.systems.append(peer)
        yield


def _peer_setup(comparison: ModelComparison, name: str) -> PeerSetup:
    return PeerSetup(
        name=name,
        model=str(comparison.model),
        dtype=comparison.plan.dtype,
        threads=comparison.plan.threads,
        context_tokens=comparison.context_tokens,
        converted=str(comparison.plan.converted),
    )


async def _measure_case(comparison: ModelComparison, case: Case) -> None:
    """Every system in turn, round after round; each round has prompts of its own, the same for all."""
    plan = comparison.plan
    taken: dict[str, list[Sample]] = {}
    facts = {one.facts.name: one.facts for one in comparison.systems}
    await _warm_up(comparison, case)
    for index in range(plan.rounds):
        workload = comparison.workload(case, SEED + index, plan.output_tokens)
        calm = comparison.workload(case, CALM_SEED + index, plan.output_tokens)
        for system in _able(comparison, workload):
            try:
                sample = await (
                    measure_disturbed(system, workload, calm) if workload.late else measure(system, workload)
                )
            except PeerFailed as error:
                comparison.drop(system.facts.name, error)
                taken.pop(system.facts.name, None)
                continue
            taken.setdefault(system.facts.name, []).append(sample)
            show_sample(comparison.model.name, system.facts.name, workload, index, sample.fields)
    results = [
        CaseResult(system=facts[name], case=case, rounds=tuple(one.fields for one in some))
        for name, some in taken.items()
    ]
    comparison.results += results
    workload = comparison.workload(case, SEED, plan.output_tokens)
    comparison.rows += _rows(comparison, workload, results, taken)


async def _warm_up(comparison: ModelComparison, case: Case) -> None:
    """A short run of the case: compiled shapes, allocators, page tables."""
    workload = comparison.workload(case, WARM_UP_SEED, WARM_UP_OUTPUT_TOKENS)
    for system in _able(comparison, workload):
        try:
            await system.run(workload)
        except PeerFailed as error:
            comparison.drop(system.facts.name, error)


def _able(comparison: ModelComparison, workload: Workload) -> list[System]:
    return [one for one in comparison.systems if one.admits_midway or not workload.late]


def _rows(
    comparison: ModelComparison,
    workload: Workload,
    results: Sequence[CaseResult],
    taken: dict[str, list[Sample]],
) -> list[dict[str, object]]:
    """One row per system: medians over the rounds, and each engine of ours over it."""
    ours = [one for one in results if one.system.is_ours]
    mine = taken[ours[0].system.name][0].heads
    prompts = [*workload.prompts, *(one.prompt for one in workload.late)]
    gap = ReferenceGap(comparison.model)
    rows = []
    for result in results:
        name = result.system.name
        agreement = compare_heads(prompts, mine, taken[name][0].heads, gap)
        rows.append(
            identity(name, result.system.version, comparison.model.name, comparison.plan.dtype, workload)
            | result.medians()
            | {"energy_source": taken[name][0].energy_source}
            | {f"{own.system.name}_ratio": ratio(own, result) for own in ours}
            | {"heads": asdict(agreement), "has_prefix_cache": result.system.has_prefix_cache}
            | {"threads": comparison.plan.threads, "rounds": comparison.plan.rounds}
            | {"rounds_output_tok_s": [one["output_tok_s"] for one in result.rounds]}
            | {"load_average": round(os.getloadavg()[0], 2)}
        )
    return rows
