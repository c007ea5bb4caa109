"""The meter series of a host for Prometheus. The agent alone exports them, so every joule is counted once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from replicas.energy.host_meter import HostMeter
from replicas.energy.meter import MeterHealth, MeterScope, MeterState, Source
from replicas.energy.polling import MeterPoller

_LABELS = ["hw_id", "hw_type", "source"]
_MAX_RETIRED = 256
_Series = tuple[str, Source, MeterScope]
"""Whose joules, by what meter, of what."""


class MeterSeries(Collector):
    """`hw_energy_joules_total`, `hw_power_watts` and the agent's own cost, from the live pollers.

    `hw_id` is the group of the watch. A measured and an estimated joule never share a series, by `source`.
    `wattline_meter_state` and `wattline_meter_check_ratio` tell how each meter is.
    The count of a group whose watch ended goes on where it was if it is watched again.
    `wattline_host_meter_joules_total` is the host's own meter, in no `hw_` series: there it would be added up
    with its devices.
    """

    def __init__(
        self,
        pollers: Callable[[], Iterable[MeterPoller]],
        *,
        host: Callable[[], HostMeter | None] = lambda: None,
        count_reads: Callable[[], int] = lambda: 0,
    ) -> None:
        self._pollers = pollers
        self._count_reads = count_reads
        self._find_host = host
        self._retired_mj: dict[_Series, int] = {}

    def retire(self, poller: MeterPoller) -> None:
        """Keep the counts of a poller that stops: a counter must not fall."""
        _add_sums(self._retired_mj, poller)
        while len(self._retired_mj) > _MAX_RETIRED:
            del self._retired_mj[next(iter(self._retired_mj))]

    def collect(self) -> Iterable[Metric]:
        """Called from the HTTP server's thread; works on a copy."""
        sums_mj = dict(self._retired_mj)
        power = GaugeMetricFamily("hw_power_watts", "Average power of the last edges.", labels=_LABELS)
        for poller in list(self._pollers()):
            _add_sums(sums_mj, poller)
            if poller.last is not None and poller.power_w is not None:
                power.add_metric(_labels(poller.group, poller.last.source, poller.scope), poller.power_w)
        energy = CounterMetricFamily(
            "hw_energy_joules", "Energy since the agent began to watch.", labels=_LABELS
        )
        for key, energy_mj in sums_mj.items():
            energy.add_metric(_labels(*key), energy_mj / 1e3)
        yield energy
        yield power
        meter = self._find_host()
        if meter is not None:
            host = CounterMetricFamily(
                "wattline_host_meter_joules",
                "What the CPUs and memory of the host drew while devices were watched.",
                labels=["source"],
            )
            host.add_metric([Source.SHARED.value], meter.energy_mj / 1e3)
            yield host
        yield from _health_families({poller.group: poller.health for poller in _worst_last(self._pollers())})
        yield CounterMetricFamily("wattline_energy_agent_reads", "Meter reads.", value=self._count_reads())
        yield CounterMetricFamily(
            "wattline_energy_agent_cpu_seconds", "CPU time of the agent's process.", value=time.process_time()
        )


def _add_sums(sums_mj: dict[_Series, int], poller: MeterPoller) -> None:
    for source, energy_mj in poller.sums_mj.items():
        series = (poller.group, source, poller.scope)
        sums_mj[series] = sums_mj.get(series, 0) + energy_mj


def _worst_last(pollers: Iterable[MeterPoller]) -> list[MeterPoller]:
    order = tuple(MeterState)
    return sorted(pollers, key=lambda poller: order.index(poller.health.state))


def _health_families(groups: Mapping[str, MeterHealth]) -> Iterable[Metric]:
    state = GaugeMetricFamily(
        "wattline_meter_state", "1 for the state the meter is in, else 0.", labels=["hw_id", "state"]
    )
    check = GaugeMetricFamily(
        "wattline_meter_check_ratio", "The meter's counter by its own integrated power.", labels=["hw_id"]
    )
    for group, health in groups.items():
        for one in MeterState:
            state.add_metric([group, one.value], float(health.state is one))
        if health.check_ratio is not None:
            check.add_metric([group], health.check_ratio)
    yield state
    yield check


def _labels(group: str, source: Source, scope: MeterScope) -> list[str]:
    hw_type = {Source.COUNTER: "gpu", Source.POWER_INTEGRATED: "gpu", Source.TDP: "cpu"}.get(source, "other")
    return [group, "module" if scope is MeterScope.MODULE else hw_type, source.value]
