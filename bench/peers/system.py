"""One engine in a comparison, ours or a peer's, and what one run of it took."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.engine import EngineUnderTest
from bench.peers.comparison import SystemFacts
from bench.record import Run, summarize
from bench.rows import wattline_version
from bench.workload import Workload
from cluster.config import EnergySection
from replicas.energy.cpu_model import CpuModelMeter

ENERGY = EnergySection()
"""Watts of the CPU model: the same for every system."""


class System(Protocol):
    """An engine that is loaded and takes workloads. `admits_midway`: see `adapter.Peer`."""

    @property
    def facts(self) -> SystemFacts: ...

    @property
    def admits_midway(self) -> bool: ...

    async def run(self, workload: Workload) -> Run:
        """Drive the workload to its end. A peer raises PeerFailed."""

    def pids(self) -> Sequence[int]:
        """The processes whose CPU time is the system's, its client's too."""


class OurEngine:
    """A rank group of ours, with this process as its client."""

    admits_midway = True

    def __init__(self, engine: EngineUnderTest, kernels: str) -> None:
        self._engine = engine
        self.facts = SystemFacts(
            name="wattline" if kernels == "auto" else f"wattline-{kernels}",
            version=wattline_version(),
            is_ours=True,
            has_prefix_cache=True,
        )

    async def run(self, workload: Workload) -> Run:
        return await self._engine.run(workload)

    def pids(self) -> Sequence[int]:
        return [os.getpid(), *(process.pid for process in self._engine.processes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run of one workload: its row fields, what the CPU model says it drew, the answers' first tokens."""

    fields: dict[str, float]
    energy_source: str
    heads: tuple[tuple[int, ...], ...]


async def measure(system: System, workload: Workload) -> Sample:
    """Run once under the CPU model, over all processes of the system. Raises PeerFailed."""
    meter = CpuModelMeter(system.pids(), static_w=ENERGY.cpu_static_w, core_w=ENERGY.cpu_core_w)
    before = meter.read()
    run = await system.run(workload)
    after = meter.read()
    fields = summarize(run.times, wall_s=run.wall_s, prompt_tokens=workload.prompt_tokens)
    energy_j = (after.energy_mj - before.energy_mj) / 1e3
    return Sample(
        fields=fields | {"joules_per_output_token": energy_j / workload.total_output_tokens},
        energy_source=after.source.value,
        heads=tuple(one.head for one in run.times),
    )


async def measure_disturbed(system: System, workload: Workload, calm: Workload) -> Sample:
    """Like `measure`, with late prompts, beside equal streams that nothing disturbs. Raises PeerFailed."""
    alone = await measure(system, calm.undisturbed)
    sample = await measure(system, workload)
    undisturbed_ms = alone.fields["tpot_ms_p99"]
    more = {
        "undisturbed_tpot_ms_p99": undisturbed_ms,
        "tpot_p99_over_undisturbed": sample.fields["tpot_ms_p99"] / undisturbed_ms,
    }
    return Sample(fields=sample.fields | more, energy_source=sample.energy_source, heads=sample.heads)
