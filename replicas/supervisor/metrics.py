"""The read-only Prometheus /metrics of one replica.

A scrape asks the event loop for a snapshot, which it takes between two of its turns, and the HTTP thread
renders it: no scrape sees half an update, so `request + idle + unattributed == meter` holds in every answer,
in whole millijoules, and all is in it that a router has been told. What nobody asks for costs nothing.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from replicas.config import MetricsAccess
from replicas.energy.meter import Source
from replicas.metrics_page import MetricsPage
from replicas.request import LoadSnapshot, StepRecord
from replicas.supervisor.energy_account import EnergyQuality, EnergySums
from replicas.supervisor.expert_metrics import ExpertSnapshot

STEP_SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
EXEMPLAR_PERIOD_NS = 1_000_000_000
SNAPSHOT_TIMEOUT_S = 1.0
"""A scrape that the loop keeps waiting for longer shows what the one before it saw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSnapshot:
    """All that a scrape shows beside the histograms. `energy` is empty while no meter spoke, `experts` is
    None of a model without."""

    load: LoadSnapshot
    num_steps: int = 0
    wasted_tokens: int = 0
    num_in_flight: int = 0
    num_links: int = 0
    experts: ExpertSnapshot | None = None
    energy: Mapping[Source, EnergySums] = field(default_factory=lambda: MappingProxyType({}))
    quality: EnergyQuality | None = None


class ReplicaMetrics(Collector):
    """Owns a registry of its own and the page that shows it; shows `snapshot` until it `follow`s something.

    `engine` is what the engine is: the labels of a series whose value is always 1.
    """

    def __init__(self, snapshot: MetricsSnapshot, *, engine: Mapping[str, str]) -> None:
        self._snapshot = snapshot
        self._ask: Callable[[Future[MetricsSnapshot]], object] | None = None
        self._engine = dict(engine)
        registry = CollectorRegistry()
        self._step_seconds = Histogram(
            "wattline_step_seconds",
            "Duration of a forward pass.",
            buckets=STEP_SECONDS_BUCKETS,
            registry=registry,
        )
        self._batch = Histogram(
            "wattline_step_sequences",
            "Sequences in a forward pass.",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._next_exemplar_ns = [0] * (len(STEP_SECONDS_BUCKETS) + 1)
        registry.register(self)
        self._registry = registry
        self._page: MetricsPage | None = None

    def serve(self, access: MetricsAccess) -> str:
        """Serve on a free port until `close`. Returns the address for scrapers; OSError where it cannot."""
        self._page = MetricsPage(self._registry, access)
        return self._page.address

    def close(self) -> None:
        if self._page is not None:
            self._page.close()

    def follow(self, take: Callable[[], MetricsSnapshot]) -> None:
        """Every scrape shows what `take` returns, called on the event loop that this is called on."""
        loop = asyncio.get_running_loop()
        self._ask = lambda answer: loop.call_soon_threadsafe(lambda: answer.set_result(take()))

    def observe_step(self, record: StepRecord, trace_of: Callable[[int], str]) -> None:
        """`trace_of` a request in it, by its number in the engine; empty: unknown.

        The exemplar of a time is a trace that was in the step; only the OpenMetrics format shows it. The last
        row's: chunks of prompts come behind the decoding sequences. A bucket gets a new one now and then,
        since that costs twice as much as to count, and the rare, slow steps have buckets of their own.
        """
        seconds = (record.end_ns - record.start_ns) / 1e9
        bucket = bisect_left(STEP_SECONDS_BUCKETS, seconds)
        trace_id = ""
        if record.end_ns >= self._next_exemplar_ns[bucket] and len(record.rows):
            trace_id = trace_of(record.rows.ids[-1])
        if trace_id:
            self._next_exemplar_ns[bucket] = record.end_ns + EXEMPLAR_PERIOD_NS
        self._step_seconds.observe(seconds, {"trace_id": trace_id} if trace_id else None)
        self._batch.observe(len(record.rows))

    def collect(self) -> Iterator[Metric]:
        snapshot = self._take()
        engine = GaugeMetricFamily("wattline_engine", "What computes; always 1.", labels=list(self._engine))
        engine.add_metric(list(self._engine.values()), 1)
        yield engine
        yield from _engine_families(snapshot)
        if snapshot.experts is not None:
            yield from snapshot.experts.families()
        yield from _energy_families(snapshot.energy)
        yield from _quality_families(snapshot.quality)

    def _take(self) -> MetricsSnapshot:
        if self._ask is not None:
            answer: Future[MetricsSnapshot] = Future()
            # RuntimeError: the loop is closed.
            with suppress(TimeoutError, RuntimeError):
                self._ask(answer)
                self._snapshot = answer.result(SNAPSHOT_TIMEOUT_S)
        return self._snapshot


def _engine_families(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    load = snapshot.load
    yield _gauge("wattline_engine_kv_blocks_free", "KV blocks not in use.", sum(load.free_blocks))
    yield _gauge("wattline_engine_kv_blocks", "KV blocks of the pool.", sum(load.total_blocks))
    yield _gauge("wattline_engine_sequences_running", "Sequences that steps work on.", sum(load.running))
    yield _gauge("wattline_engine_sequences_waiting", "Sequences not started yet.", sum(load.waiting))
    yield _gauge("wattline_engine_requests", "Requests that the engine holds.", snapshot.num_in_flight)
    yield _gauge("wattline_links", "Routers attached.", snapshot.num_links)
    yield CounterMetricFamily("wattline_engine_steps", "Forward passes.", value=snapshot.num_steps)
    yield CounterMetricFamily(
        "wattline_prefix_cached_tokens",
        "Prompt tokens found in the prefix cache.",
        value=load.cached_tokens_total,
    )
    tokens = CounterMetricFamily("wattline_engine_tokens", "Tokens of this engine, by kind.", labels=["kind"])
    tokens.add_metric(["prompt"], load.prompt_tokens_total)
    tokens.add_metric(["generated"], load.generated_tokens_total)
    tokens.add_metric(["wasted"], snapshot.wasted_tokens)
    yield tokens


def _energy_families(energy: Mapping[Source, EnergySums]) -> Iterator[Metric]:
    """Nothing at all while energy is unknown: a series of zeros would be a claim."""
    if not energy:
        return
    joules = CounterMetricFamily(
        "wattline_replica_energy_joules", "Metered energy by who it was for.", labels=["ledger", "source"]
    )
    meter = CounterMetricFamily(
        "wattline_replica_meter_joules", "Energy that was divided.", labels=["source"]
    )
    exact = GaugeMetricFamily(
        "wattline_ledger_millijoules",
        "The ledger's integers over all sources: request + idle + unattributed == meter.",
        labels=["ledger"],
    )
    for source, sums in energy.items():
        for ledger, value_mj in _divided(sums):
            joules.add_metric([ledger, source.value], value_mj / 1e3)
        meter.add_metric([source.value], sums.meter_mj / 1e3)
    total = sum(energy.values(), EnergySums())
    for ledger, value_mj in (*_divided(total), ("meter", total.meter_mj)):
        exact.add_metric([ledger], value_mj)
    yield joules
    yield meter
    yield exact


def _quality_families(quality: EnergyQuality | None) -> Iterator[Metric]:
    """The labels of the target say which model this is; nothing while no meter counted."""
    if quality is None:
        return
    if quality.calibration_ratio is not None:
        yield _gauge(
            "wattline_energy_calibration_ratio",
            "Modelled by metered energy of the last windows; 1 is right.",
            quality.calibration_ratio,
        )
    yield _gauge(
        "wattline_energy_coefficients_learned",
        "1: energy is divided by what was learned from the meter; 0: by what was shipped.",
        float(quality.is_learned),
    )
    yield CounterMetricFamily(
        "wattline_energy_low_confidence_bills",
        "Requests whose steps the meter did not see all of.",
        value=quality.num_low_confidence,
    )
    yield _gauge(
        "wattline_energy_unattributed_ratio",
        "Part of all metered energy that belongs to nobody known.",
        quality.unattributed_share,
    )


def _divided(sums: EnergySums) -> tuple[tuple[str, int], ...]:
    return ("request", sums.request_mj), ("idle", sums.idle_mj), ("unattributed", sums.unattributed_mj)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
