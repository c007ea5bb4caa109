"""What a step record costs the supervisor: off the wire, through the ledger, its part of a window, and bills.

Sequences come and go: each is prefilled, decodes, ends, and another takes its place. Counted is CPU time of
this process, so other work on the machine adds little.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

from bench.record import write_results
from bench.shapley_mixes import LLAMA_8B
from protos import wattline_rank_pb2 as rank_pb2
from replicas.energy.learning import CoefficientLearner
from replicas.energy.ledger import Ledger
from replicas.energy.meter import Reading, Source
from replicas.energy.weights import GPU_COEFFICIENTS
from replicas.request import StepMember, StepRecord, StepRows
from replicas.wire.steps import record_from_wire, record_to_wire

STEP_NS = 10_000_000
STEPS_PER_WINDOW = 10
POWER_W = 500
PROMPT_TOKENS = 300
OUTPUT_TOKENS = 200
WINDOWS_TO_WARM = 20
ROUNDS = 5
NS_PER_MS = 1_000_000


def run_ledger_cost(batches: list[int], num_windows: int, path: Path | None) -> None:
    """Measure each batch size: print and write CPU microseconds per step record."""
    rows: list[dict[str, object]] = []
    for batch in batches:
        costs_us = sorted(measure_us(batch, num_windows) for _ in range(ROUNDS))
        row: dict[str, object] = {
            "batch": batch,
            "steps": num_windows * STEPS_PER_WINDOW,
            "step_record_us_p50": round(costs_us[ROUNDS // 2], 1),
            "step_record_us_min": round(costs_us[0], 1),
        }
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print(write_results("ledger", rows, path))


def measure_us(batch: int, num_windows: int) -> float:
    """CPU microseconds of the ledger per step of `batch` sequences, in windows of ten steps."""
    ledger = Ledger(costs=LLAMA_8B, idle_power_w=110.0, learner=CoefficientLearner(GPU_COEFFICIENTS))
    ledger.add_reading(Reading(t_ns=0, energy_mj=0, source=Source.COUNTER))
    steps = decoding_steps(batch)
    gc.collect()
    gc.disable()
    spent_ns = 0
    for window in range(WINDOWS_TO_WARM + num_windows):
        if window == WINDOWS_TO_WARM:
            spent_ns = 0
        frames = [
            (record_to_wire(record).SerializeToString(), ended_ids)
            for record, ended_ids in islice(steps, STEPS_PER_WINDOW)
        ]
        start_ns = time.process_time_ns()
        for frame, ended_ids in frames:
            record = record_from_wire(rank_pb2.StepRecord.FromString(frame))
            ledger.add_step(record)
            for request_id in ended_ids:
                ledger.end_request(request_id, record.end_ns)
            ledger.advance(record.end_ns)
        end_ns = record.end_ns
        ledger.add_reading(
            Reading(t_ns=end_ns, energy_mj=POWER_W * (end_ns // NS_PER_MS), source=Source.COUNTER)
        )
        ledger.take_closed()
        spent_ns += time.process_time_ns() - start_ns
    gc.enable()
    totals = ledger.totals()
    assert totals.requests_mj == totals.meter_mj > 0, "the steps leave no pause, so all of it is theirs"
    return spent_ns / (num_windows * STEPS_PER_WINDOW) / 1e3


def decoding_steps(batch: int) -> Iterator[tuple[StepRecord, list[int]]]:
    """Steps back to back, with whom each ends; every sequence is at another place of its life."""
    ids = list(range(1, batch + 1))
    ages = [index * OUTPUT_TOKENS // batch for index in range(batch)]
    next_id = batch + 1
    for step in count(1):
        members = [
            StepMember(
                request_id=request_id,
                new_tokens=1 if age else PROMPT_TOKENS,
                context_tokens=PROMPT_TOKENS + age - 1 if age else 0,
                is_prefill=not age,
            )
            for request_id, age in zip(ids, ages, strict=True)
        ]
        ended = [index for index, age in enumerate(ages) if age == OUTPUT_TOKENS - 1]
        record = StepRecord(
            step=step, start_ns=(step - 1) * STEP_NS, end_ns=step * STEP_NS, rows=StepRows.of(members)
        )
        yield record, [ids[index] for index in ended]
        ages = [age + 1 for age in ages]
        for index in ended:
            ids[index], ages[index] = next_id, 0
            next_id += 1
