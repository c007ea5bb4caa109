"""/metrics of a replica: what is known is shown, what is not known is not shown as zero."""

from __future__ import annotations

import asyncio
import re
import threading
import urllib.request

from replicas.config import MetricsAccess
from replicas.energy.meter import Source
from replicas.request import LoadSnapshot, StepMember, StepRecord, StepRows
from replicas.supervisor.energy_account import EnergyQuality, EnergySums
from replicas.supervisor.metrics import MetricsSnapshot, ReplicaMetrics

LOAD = LoadSnapshot(
    step=9,
    running=(2, 1),
    waiting=(0, 4),
    waiting_prefill_tokens=(0, 9),
    free_blocks=(5, 6),
    total_blocks=(8, 8),
    prompt_tokens_total=30,
    generated_tokens_total=12,
    cached_tokens_total=16,
)

ENGINE = {"device": "cpu", "kernels": "avx2-float32"}


MS = 1_000_000


def read_page(metrics: ReplicaMetrics, **headers: str) -> str:
    address = metrics.serve(MetricsAccess())
    try:
        request = urllib.request.Request(f"http://{address}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read(), "utf-8")
    finally:
        metrics.close()


def scrape(metrics: ReplicaMetrics) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in read_page(metrics).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_lanes_are_added_up_and_steps_observed() -> None:
    metrics = ReplicaMetrics(MetricsSnapshot(load=LOAD, num_steps=3, wasted_tokens=2), engine=ENGINE)
    member = StepMember(request_id=1, new_tokens=1, context_tokens=0, is_prefill=False)
    record = StepRecord(step=1, start_ns=0, end_ns=4_000_000, rows=StepRows.of([member, member]))
    metrics.observe_step(record, lambda engine_id: "")
    values = scrape(metrics)
    assert values["wattline_engine_kv_blocks_free"] == 11
    assert values["wattline_engine_kv_blocks"] == 16
    assert values['wattline_engine{device="cpu",kernels="avx2-float32"}'] == 1
    assert values["wattline_engine_steps_total"] == 3
    assert values["wattline_prefix_cached_tokens_total"] == 16
    assert values['wattline_engine_tokens_total{kind="wasted"}'] == 2
    assert values['wattline_step_seconds_bucket{le="0.005"}'] == 1
    assert values["wattline_step_sequences_sum"] == 2


def test_a_step_time_has_a_trace_that_was_in_the_step_in_every_bucket_and_a_new_one_now_and_then() -> None:
    """The last row's: a prompt's chunk lengthens a step, and comes behind the decoding sequences."""
    metrics = ReplicaMetrics(MetricsSnapshot(load=LOAD), engine=ENGINE)
    for end_ms, duration_ms, last_id in ((1_000, 4, 11), (1_500, 4, 12), (1_600, 300, 13), (2_000, 4, 14)):
        members = [StepMember(each, 1, 0, is_prefill=False) for each in (1, last_id)]
        record = StepRecord(
            step=1,
            start_ns=(end_ms - duration_ms) * MS,
            end_ns=end_ms * MS,
            rows=StepRows.of(members),
        )
        metrics.observe_step(record, lambda engine_id: f"trace-{engine_id}")
        if end_ms == 1_500:
            assert exemplars(metrics) == {"0.005": "trace-11"}
    assert exemplars(metrics) == {"0.005": "trace-14", "0.5": "trace-13"}


def exemplars(metrics: ReplicaMetrics) -> dict[str, str]:
    """Of step times: by the upper bound of the bucket, as the OpenMetrics format shows them."""
    return {
        bucket: trace_id
        for line in read_page(metrics, Accept="application/openmetrics-text").splitlines()
        for bucket, trace_id in re.findall(
            r'wattline_step_seconds_bucket{le="(.*)"} .* # {trace_id="(.*)"}', line
        )
    }


def test_unknown_energy_has_no_series() -> None:
    values = scrape(ReplicaMetrics(MetricsSnapshot(load=LOAD), engine=ENGINE))
    assert not [name for name in values if "joules" in name]


def test_joules_by_source_and_exact_integers_over_all() -> None:
    energy = {
        Source.COUNTER: EnergySums(
            request_mj=9_007_199_254_740, idle_mj=1, unattributed_mj=0, meter_mj=9_007_199_254_741
        ),
        Source.TDP: EnergySums(request_mj=1, idle_mj=1, unattributed_mj=1, meter_mj=3),
    }
    values = scrape(ReplicaMetrics(MetricsSnapshot(load=LOAD, energy=energy), engine=ENGINE))
    assert values['wattline_replica_energy_joules_total{ledger="idle",source="tdp"}'] == 0.001
    assert values['wattline_replica_meter_joules_total{source="tdp"}'] == 0.003
    assert values['wattline_ledger_millijoules{ledger="request"}'] == 9_007_199_254_741
    assert values['wattline_ledger_millijoules{ledger="meter"}'] == 9_007_199_254_744


def test_what_the_division_is_worth_is_shown_once_a_meter_counted() -> None:
    quality = EnergyQuality(
        calibration_ratio=0.98, is_learned=True, num_low_confidence=2, unattributed_share=0.25
    )
    values = scrape(ReplicaMetrics(MetricsSnapshot(load=LOAD, quality=quality), engine=ENGINE))
    assert values["wattline_energy_calibration_ratio"] == 0.98
    assert values["wattline_energy_coefficients_learned"] == 1
    assert values["wattline_energy_low_confidence_bills_total"] == 2
    assert values["wattline_energy_unattributed_ratio"] == 0.25


async def test_a_scrape_sees_what_is_so_when_it_comes() -> None:
    metrics = ReplicaMetrics(MetricsSnapshot(load=LOAD), engine=ENGINE)
    seen: list[threading.Thread] = []

    def take() -> MetricsSnapshot:
        seen.append(threading.current_thread())
        return MetricsSnapshot(load=LOAD, num_steps=len(seen))

    metrics.follow(take)
    values = await asyncio.to_thread(scrape, metrics)
    assert values["wattline_engine_steps_total"] == 1
    assert seen == [threading.current_thread()]


def test_what_never_served_closes_without_a_word() -> None:
    ReplicaMetrics(MetricsSnapshot(load=LOAD), engine=ENGINE).close()
