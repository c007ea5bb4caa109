"""What a step costs outside the model: schedule, plan words, commit, and the frame to the supervisor.

The engine is the real one; its runner answers at once, and what it takes is left out. Every sequence decodes,
so each step plans, commits and reports one token of each.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bench.record import percentile, write_results
from replicas.config import EngineLimits, NullEngineConfig
from replicas.engine.engine import Engine
from replicas.engine.scheduler import Scheduler
from replicas.frames import encode_event
from replicas.plan import PendingStep, StepOutcome, StepPlan, encode_plan
from replicas.rank.null_runner import NullRunner
from replicas.request import GenerationRequest
from replicas.step_report import report_of

PROMPT_TOKENS = 128
BLOCK_TOKENS = EngineLimits().block_tokens
STEPS_TO_WARM = 50
PARTS = ("schedule", "encode", "commit", "frame")
NS_PER_MS = 1e6

console = Console()


@dataclass(frozen=True, slots=True)
class _Answered:
    """A step whose outcome is known; tells the watch when it was asked for."""

    watch: _Watch
    pending: PendingStep

    def result(self) -> StepOutcome:
        outcome = self.pending.result()
        self.watch.answered_ns = time.perf_counter_ns()
        return outcome


@dataclass(slots=True)
class _Watch:
    """A runner that takes the times between which the engine itself was at work."""

    inner: NullRunner
    planned_ns: int = field(default=0, init=False)
    encoded_ns: int = field(default=0, init=False)
    answered_ns: int = field(default=0, init=False)

    def launch(self, plan: StepPlan) -> PendingStep:
        self.planned_ns = time.perf_counter_ns()
        encode_plan(plan)
        self.encoded_ns = time.perf_counter_ns()
        return _Answered(self, self.inner.launch(plan))

    def close(self) -> None:
        self.inner.close()


def run_overhead_suite(batches: list[int], num_steps: int, path: Path | None) -> None:
    """Measure each batch size and write one file."""
    rows = [measure_overhead(batch, num_steps) for batch in batches]
    console.print(f"written to {write_results('overhead', rows, path)}")


def measure_overhead(batch: int, num_steps: int) -> dict[str, object]:
    """Milliseconds per step with `batch` sequences decoding: the parts, and all but the frame as one."""
    engine, watch = _decoding_engine(batch, num_steps)
    samples: dict[str, list[float]] = {part: [] for part in (*PARTS, "step")}
    gc.collect()
    for _ in range(num_steps):
        start_ns = time.perf_counter_ns()
        result = engine.step()
        committed_ns = time.perf_counter_ns()
        encode_event(report_of(result))
        framed_ns = time.perf_counter_ns()
        assert len(result.deltas) == batch
        spent_ns = (
            watch.planned_ns - start_ns,
            watch.encoded_ns - watch.planned_ns,
            committed_ns - watch.answered_ns,
            framed_ns - committed_ns,
        )
        for part, value_ns in zip((*PARTS, "step"), (*spent_ns, sum(spent_ns[:3])), strict=True):
            samples[part].append(value_ns / NS_PER_MS)
    row: dict[str, object] = {"system": "wattline-engine", "batch": batch, "steps": num_steps}
    for part, values in samples.items():
        row[f"{part}_ms_p50"] = round(statistics.median(values), 4)
        row[f"{part}_ms_p99"] = round(percentile(values, 99), 4)
    console.print("  ".join(f"{key} [bold]{value}[/]" for key, value in row.items()), highlight=False)
    return row


def _decoding_engine(batch: int, num_steps: int) -> tuple[Engine, _Watch]:
    """An engine whose `batch` sequences all decode, for `num_steps` more at least."""
    output_tokens = STEPS_TO_WARM + num_steps + 2 * batch
    context_tokens = PROMPT_TOKENS + output_tokens
    limits = EngineLimits(
        max_sequences=batch,
        step_tokens=max(512, 2 * batch),
        num_blocks=2 + batch * (context_tokens // BLOCK_TOKENS + 2),
    )
    null = NullEngineConfig(step_ms=0.0, prefill_tokens_per_s=0.0, context_tokens=context_tokens + 1)
    watch = _Watch(NullRunner(null, limits))
    engine = Engine(watch, Scheduler(limits, watch.inner.shape))
    for request_id in range(batch):
        prompt_ids = tuple(3 + (request_id * 7919 + pos) % 30_000 for pos in range(PROMPT_TOKENS))
        engine.submit(
            GenerationRequest(request_id=request_id, prompt_ids=prompt_ids, max_tokens=output_tokens)
        )
    while len(engine.step().deltas) < batch:
        pass
    for _ in range(STEPS_TO_WARM):
        engine.step()
    return engine, watch
