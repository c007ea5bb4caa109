"""Prometheus series of the router. Joules here are the requests' shares; agents export the meters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.energy.account import RequestEnergy
from cluster.request.answer import Usage
from cluster.telemetry.journal import ClosedRequest

# Buckets of the GenAI conventions; the first-token ones go on past 10 s for cold prompts on CPU.
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
UNKNOWN_MODEL = "unknown"
"""The label for names that are not configured: callers must not make label values."""


class RouterMetrics:
    """Owns one registry, so that two routers in a process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ("model",), buckets=buckets, registry=self.registry)

        self._requests = counter("wattline_requests", "Requests ended, by gRPC status.", "model", "code")
        self._admissions = counter(
            "wattline_admissions",
            "Requests that arrived, by tenant: admitted, refused and why, or cancelled before either.",
            "model",
            "tenant",
            "outcome",
        )
        self._slo = counter(
            "wattline_slo_answers", "Answers by whether they kept the model's objective.", "model", "slo"
        )
        self._tokens = counter("wattline_tokens", "Tokens, by kind.", "model", "kind")
        self._energy = counter(
            "wattline_request_energy_joules", "Energy attributed to requests.", "model", "phase", "source"
        )
        self._failovers = counter(
            "wattline_failovers",
            "Streams that went on at another replica, by how they lost theirs.",
            "model",
            "reason",
        )
        self._link_messages = counter(
            "wattline_link_messages", "Messages on replica links.", "direction", "event"
        )
        self._ttft = histogram(
            "wattline_time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS
        )
        self._tpot = histogram(
            "wattline_time_per_output_token_seconds", "Mean time of later tokens.", TPOT_BUCKETS
        )
        self._duration = histogram(
            "wattline_request_duration_seconds", "Arrival to last token.", DURATION_BUCKETS
        )
        self._refusal = histogram("wattline_refusal_seconds", "Arrival to refusal.", TTFT_BUCKETS)
        self._queue = histogram("wattline_queue_seconds", "Waiting, here and in the engine.", TTFT_BUCKETS)

    def add_gauges(self, read: Callable[[], Iterable[Metric]]) -> None:
        """Gauges that are read off when they are asked for."""
        self.registry.register(_GaugeReader(read))

    def count_request(self, model: str, code: str) -> None:
        self._requests.labels(model or UNKNOWN_MODEL, code).inc()

    def count_admission(self, model: str, tenant: str, outcome: str) -> None:
        self._admissions.labels(model, tenant, outcome).inc()

    def observe_refusal(self, model: str, seconds: float) -> None:
        self._refusal.labels(model).observe(seconds)

    def count_failover(self, model: str, reason: str) -> None:
        self._failovers.labels(model, reason).inc()

    def count_link_message(self, direction: str, event: str) -> None:
        self._link_messages.labels(direction, event).inc()

    def observe_request(self, closed: ClosedRequest, *, is_met: bool | None) -> None:
        """One request that reached a replica. Times of those that gave at least a token, whole or not.

        The exemplar of a time is the trace it came from; only the OpenMetrics format shows it.
        """
        model, exemplar = closed.model, {"trace_id": closed.trace_id}
        if is_met is not None:
            # Both from the first answer on: a ratio of series needs the other one to be 0, not absent.
            self._slo.labels(model, "met").inc(is_met)
            self._slo.labels(model, "missed").inc(not is_met)
        if closed.ttft_ms is None:
            return
        self._ttft.labels(model).observe(closed.ttft_ms / 1e3, exemplar)
        self._duration.labels(model).observe(closed.timing.total_ms / 1e3, exemplar)
        self._queue.labels(model).observe(closed.timing.queue_ms / 1e3, exemplar)
        if closed.tpot_ms is not None:
            self._tpot.labels(model).observe(closed.tpot_ms / 1e3, exemplar)

    def count_tokens(self, model: str, usage: Usage) -> None:
        self._tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(model, "cached").inc(usage.cached_tokens)
        self._tokens.labels(model, "output").inc(usage.completion_tokens)
        self._tokens.labels(model, "wasted").inc(usage.wasted_tokens)

    def add_energy(self, model: str, energy: RequestEnergy) -> None:
        """The settled joules of one request."""
        self._energy.labels(model, "prefill", energy.source).inc(energy.prefill_mj / 1e3)
        self._energy.labels(model, "decode", energy.source).inc(energy.decode_mj / 1e3)


class _GaugeReader(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()
