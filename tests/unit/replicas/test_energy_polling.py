"""One poller, many watchers: edges only, the last one at once for who comes later."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from replicas.energy.agent_metrics import MeterSeries
from replicas.energy.host_meter import HostMeter
from replicas.energy.meter import HEALTHY, MeterHealth, MeterScope, MeterState, Reading, Source
from replicas.energy.polling import MeterPoller, Subscriber

MS = 1_000_000


class ScriptedMeter:
    """Gives the readings it was made with, one per read, the last one again and again."""

    edges = None
    scope = MeterScope.DEVICE

    def __init__(self, *readings: Reading | None) -> None:
        self._readings = list(readings)
        self.is_closed = False
        self.state = HEALTHY

    def read(self) -> Reading | None:
        return self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]

    def health(self) -> MeterHealth:
        return self.state

    def close(self) -> None:
        self.is_closed = True


def make_reading(t_ms: int, energy_mj: int, *, gap: bool = False, static_mj: int | None = None) -> Reading:
    return Reading(t_ns=t_ms * MS, energy_mj=energy_mj, source=Source.COUNTER, gap=gap, static_mj=static_mj)


def make_poller(meter: ScriptedMeter, group: str = "llama-0") -> MeterPoller:
    return MeterPoller(meter, group=group)


async def test_watchers_get_edges_and_late_ones_the_last_one_first() -> None:
    poller = make_poller(
        ScriptedMeter(
            make_reading(0, 500, static_mj=50),
            make_reading(0, 500, static_mj=50),
            None,
            make_reading(100, 700, static_mj=60),
        )
    )
    early = poller.subscribe()
    for _ in range(4):
        poller.poll()
    late = poller.subscribe()
    assert await early.take() == [
        make_reading(0, 500, static_mj=50),
        make_reading(100, 700, static_mj=60),
    ]
    assert await late.take() == [make_reading(100, 700, static_mj=60)]
    assert poller.sums_mj == {Source.COUNTER: 200}
    assert poller.power_w == pytest.approx(2.0)


async def test_an_edge_without_energy_is_an_edge() -> None:
    poller = make_poller(ScriptedMeter(make_reading(0, 500), make_reading(100, 500)))
    watcher = poller.subscribe()
    poller.poll()
    poller.poll()
    assert await watcher.take() == [make_reading(0, 500), make_reading(100, 500)]


async def test_a_reading_dated_from_before_its_meter_hung_is_left_out_and_its_gap_kept() -> None:
    meter = ScriptedMeter(make_reading(0, 0), make_reading(100, 900, gap=True), make_reading(300, 900))
    poller = make_poller(meter)
    watcher = poller.subscribe()
    poller.poll()
    poller.set_hangs(True)
    poller.poll()
    poller.set_hangs(False)
    poller.poll()
    assert await watcher.take() is MeterState.OK
    assert await watcher.take() == [make_reading(0, 0), make_reading(300, 900, gap=True)]


async def test_a_slow_watcher_gets_wider_windows_and_keeps_the_gap() -> None:
    watcher = Subscriber()
    for number in range(1000):
        watcher.put(make_reading(number, 10 * number, gap=number == 3))
    edges = await watcher.take()
    assert len(edges) == 256
    assert edges[0] == make_reading(744, 7440, gap=True)
    assert edges[-1] == make_reading(999, 9990)


def test_series_carry_their_source_and_go_on_when_a_watch_is_opened_again() -> None:
    pollers: list[MeterPoller] = []
    series = MeterSeries(lambda: pollers)
    registry = CollectorRegistry()
    registry.register(series)
    for _ in range(2):
        poller = make_poller(ScriptedMeter(make_reading(0, 0), make_reading(100, 2000)))
        pollers.append(poller)
        poller.poll()
        poller.poll()
        text = generate_latest(registry).decode()
        pollers.remove(poller)
        series.retire(poller)
    assert 'hw_energy_joules_total{hw_id="llama-0",hw_type="gpu",source="counter"} 4.0' in text
    assert 'hw_power_watts{hw_id="llama-0",hw_type="gpu",source="counter"} 20.0' in text


def test_a_meter_that_falls_back_on_power_and_returns_counts_each_joule_in_one_series() -> None:
    """Two sums over all of its time would tell the joules of the fallback twice, and one would vanish."""
    edges = [make_reading(0, 500), make_reading(100, 1500), make_reading(200, 4500), make_reading(300, 4700)]
    edges[2] = replace(edges[2], source=Source.POWER_INTEGRATED)
    poller = make_poller(ScriptedMeter(*edges))
    registry = CollectorRegistry()
    registry.register(MeterSeries(lambda: [poller]))
    for _ in edges:
        poller.poll()
    text = generate_latest(registry).decode()
    assert 'hw_energy_joules_total{hw_id="llama-0",hw_type="gpu",source="counter"} 1.2' in text
    assert 'hw_energy_joules_total{hw_id="llama-0",hw_type="gpu",source="power_integrated"} 3.0' in text


def test_the_state_of_a_meter_is_one_of_four_series() -> None:
    meter = ScriptedMeter(make_reading(0, 0))
    meter.state = MeterHealth(state=MeterState.STALE, check_ratio=0.875)
    registry = CollectorRegistry()
    poller = make_poller(meter)
    registry.register(MeterSeries(lambda: [poller]))
    poller.poll()
    text = generate_latest(registry).decode()
    assert 'wattline_meter_state{hw_id="llama-0",state="stale"} 1.0' in text
    for state in ("ok", "reset", "lost"):
        assert f'wattline_meter_state{{hw_id="llama-0",state="{state}"}} 0.0' in text
    assert 'wattline_meter_check_ratio{hw_id="llama-0"} 0.875' in text


def test_the_hosts_own_meter_has_a_series_of_its_own() -> None:
    host = HostMeter(ScriptedMeter(make_reading(0, 500), make_reading(100, 2500)))
    poller = make_poller(ScriptedMeter(make_reading(0, 0), make_reading(100, 4000)))
    poller.sit_at(host)
    registry = CollectorRegistry()
    registry.register(MeterSeries(lambda: [poller], host=lambda: host))
    for one in (host, poller, host, poller):
        one.poll()
    text = generate_latest(registry).decode()
    assert 'wattline_host_meter_joules_total{source="shared"} 2.0' in text
    assert 'hw_energy_joules_total{hw_id="llama-0",hw_type="gpu",source="counter"} 4.0' in text


def test_watches_of_one_group_show_its_worst_state() -> None:
    meters = [ScriptedMeter(make_reading(0, 0)) for _ in range(2)]
    meters[0].state = MeterHealth(state=MeterState.LOST)
    pollers = [make_poller(meter) for meter in meters]
    registry = CollectorRegistry()
    registry.register(MeterSeries(lambda: pollers))
    assert 'state="lost"} 1.0' in generate_latest(registry).decode()
