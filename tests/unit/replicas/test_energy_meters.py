"""Meters without hardware, on virtual clocks: every joule can be written down."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from replicas.energy.cpu_model import CpuModelMeter, cpu_time_ns
from replicas.energy.meter import Reading, Source
from replicas.energy.replay import (
    FakeMeter,
    MeterFault,
    ReplayMeter,
    StepPowerMeter,
    read_recording,
    write_recording,
)

MS = 1_000_000


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self, now_ms: int = 0) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms * MS


def test_the_cpu_model_is_static_watts_plus_watts_per_busy_core() -> None:
    clock = Clock()
    used = {1: 5 * 10**9, 2: 0}
    meter = CpuModelMeter([1, 2], static_w=10.0, core_w=8.0, clock=clock, cpu_time_ns=used.get)
    clock.now_ms = 1000
    used[1] += 10**9
    used[2] += 10**9
    assert meter.read() == Reading(t_ns=1000 * MS, energy_mj=26_000, source=Source.TDP, static_mj=10_000)


def test_a_dead_process_keeps_what_it_used_and_an_old_pid_never_counts_down() -> None:
    clock = Clock()
    used = {1: 10**9}
    meter = CpuModelMeter([1], static_w=0.0, core_w=8.0, clock=clock, cpu_time_ns=used.get)
    used[1] = 2 * 10**9
    assert meter.read().energy_mj == 8_000
    del used[1]
    assert meter.read().energy_mj == 8_000
    used[1] = 10**9 // 2
    assert meter.read().energy_mj == 8_000
    used[1] = 10**9
    assert meter.read().energy_mj == 12_000


def test_cpu_time_is_read_of_any_process_and_none_of_one_that_is_gone() -> None:
    first = cpu_time_ns(os.getpid())
    second = cpu_time_ns(os.getpid())
    assert first is not None
    assert second is not None
    assert 0 < first <= second
    assert cpu_time_ns(2**22 + 1) is None


def test_the_step_power_meter_counts_power_while_steps_run() -> None:
    clock = Clock()
    meter = StepPowerMeter(power_w=400.0, idle_power_w=80.0, clock=clock, settle_s=0.02)
    meter.note_step(100 * MS, 105 * MS)
    clock.now_ms = 1020
    assert meter.read() == Reading(t_ns=1000 * MS, energy_mj=81_600, source=Source.FAKE, static_mj=80_000)


def test_the_step_power_meter_splits_a_step_at_its_reading_and_loses_no_late_one() -> None:
    clock = Clock()
    meter = StepPowerMeter(power_w=180.0, idle_power_w=80.0, clock=clock, settle_s=0.0)
    meter.note_step(0, 100 * MS)
    clock.now_ms = 40
    assert meter.read().energy_mj == 40 * 180
    clock.now_ms = 120
    assert meter.read().energy_mj == 100 * 180 + 20 * 80
    meter.note_step(100 * MS, 120 * MS)
    assert meter.read().energy_mj == 100 * 180 + 20 * 80
    clock.now_ms = 140
    assert meter.read().energy_mj == 120 * 180 + 20 * 80


def test_the_step_power_meter_never_counts_the_same_time_twice() -> None:
    clock = Clock()
    meter = StepPowerMeter(power_w=180.0, idle_power_w=80.0, clock=clock, settle_s=0.0)
    meter.note_step(0, 50 * MS)
    meter.note_step(30 * MS, 60 * MS)
    clock.now_ms = 100
    assert meter.read().energy_mj == 60 * 180 + 40 * 80


def test_a_step_power_meter_that_nobody_reads_stays_small() -> None:
    clock = Clock()
    meter = StepPowerMeter(power_w=180.0, idle_power_w=80.0, clock=clock, settle_s=0.0)
    for number in range(5000):
        meter.note_step(number * MS, (number + 1) * MS)
    clock.now_ms = 5000
    assert meter.read().energy_mj == 5000 * 180


def test_the_fake_meter_counts_its_script_in_edges() -> None:
    clock = Clock(7)
    meter = FakeMeter(((0, 100.0), (150 * MS, 300.0)), clock=clock)
    clock.now_ms = 7 + 199
    assert meter.read() == Reading(t_ns=107 * MS, energy_mj=10_000, source=Source.FAKE)
    clock.now_ms = 7 + 200
    assert meter.read() == Reading(t_ns=207 * MS, energy_mj=30_000, source=Source.FAKE)


def test_the_fake_meters_noise_is_seeded_and_near_the_truth() -> None:
    def read_after_10_s(seed: int) -> int:
        clock = Clock()
        meter = FakeMeter(((0, 100.0),), clock=clock, noise=0.05, seed=seed)
        clock.now_ms = 10_000
        reading = meter.read()
        assert reading is not None
        return reading.energy_mj

    assert read_after_10_s(1) == read_after_10_s(1) != read_after_10_s(2)
    assert read_after_10_s(1) == pytest.approx(1_000_000, rel=0.03)


def test_the_fake_meter_stalls_is_lost_and_resets_as_told() -> None:
    clock = Clock()
    faults = (
        MeterFault(kind="stall", start_ns=150 * MS, duration_ns=300 * MS),
        MeterFault(kind="lost", start_ns=600 * MS, duration_ns=100 * MS),
        MeterFault(kind="reset", start_ns=850 * MS),
    )
    meter = FakeMeter(((0, 100.0),), clock=clock, faults=faults)
    seen = []
    for now_ms in (100, 400, 500, 650, 700, 800, 900, 1000):
        clock.now_ms = now_ms
        reading = meter.read()
        seen.append(None if reading is None else (reading.t_ns // MS, reading.energy_mj, reading.gap))
    assert seen == [
        (100, 10_000, False),
        (100, 10_000, False),
        (500, 50_000, False),
        None,
        (700, 70_000, True),
        (800, 80_000, False),
        (900, 80_000, True),
        (1000, 90_000, False),
    ]


def test_a_power_script_begins_at_zero_and_goes_forward() -> None:
    with pytest.raises(ValueError, match="the first from 0"):
        FakeMeter(((5, 100.0),))


def make_recording() -> list[Reading]:
    return [
        Reading(t_ns=1000, energy_mj=5, source=Source.COUNTER),
        Reading(t_ns=2000, energy_mj=7, source=Source.COUNTER, static_mj=3, gap=True),
        Reading(t_ns=3000, energy_mj=9, source=Source.COUNTER),
    ]


def test_a_recording_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "edges.jsonl"
    with path.open("w", encoding="utf-8") as file:
        write_recording(make_recording(), file)
    assert read_recording(path) == make_recording()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", r"edges.jsonl:1: not a reading"),
        ('{"t_ns": 1, "energy_mj": 2, "source": "guess"}\n', r"guess"),
        ('{"t_ns": 1, "energy_mj": 2, "source": "fake"}\n' * 2, r"edges.jsonl:2: t_ns=1 does not rise"),
    ],
)
def test_a_broken_recording_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "edges.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_recording(path)


def test_a_replay_plays_from_now_and_keeps_gaps_it_skips() -> None:
    now_ns = 50_000

    def clock() -> int:
        return now_ns

    meter = ReplayMeter(make_recording(), clock=clock)
    assert meter.read() == Reading(t_ns=50_000, energy_mj=5, source=Source.COUNTER)
    now_ns = 52_500
    assert meter.read() == Reading(t_ns=52_000, energy_mj=9, source=Source.COUNTER, gap=True)


def test_writing_one_line_per_reading() -> None:
    file = io.StringIO()
    write_recording(make_recording()[:1], file)
    assert file.getvalue() == (
        '{"t_ns": 1000, "energy_mj": 5, "source": "counter", "static_mj": null, "gap": false}\n'
    )
