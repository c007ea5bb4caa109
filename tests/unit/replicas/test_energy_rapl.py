"""RAPL against made-up powercap folders: wraps, resets, zones that count twice, and files for root only."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from replicas.energy.meter import MeterState, Reading, Source
from replicas.energy.rapl import RaplMeter, discover_zones
from replicas.errors import MeterUnavailable

MS = 1_000_000
RANGE_UJ = 262_143_328_850


class Host:
    """A powercap folder whose counters the test moves, and its clock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now_ns = 0

    def clock(self) -> int:
        return self.now_ns

    def add(self, zone: str, name: str, energy_uj: int = 0) -> None:
        folder = self.root / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        self.set(zone, energy_uj)

    def set(self, zone: str, energy_uj: int) -> None:
        (self.root / zone / "energy_uj").write_text(f"{energy_uj}\n")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.add("intel-rapl:0", "package-0", 1_000_000)
    made.add("intel-rapl:0:0", "core", 500_000)
    made.add("intel-rapl:0:1", "dram", 2_000_000)
    made.add("intel-rapl:1", "psys", 9_000_000)
    return made


def read_after(host: Host, meter: RaplMeter, wait_ms: int) -> Reading:
    host.now_ns += wait_ms * MS
    reading = meter.read()
    assert reading is not None
    return reading


def test_packages_and_their_memory_are_summed_and_nothing_is_counted_twice(host: Host) -> None:
    assert [zone.name for zone in discover_zones(host.root)] == ["package-0", "package-0/dram"]
    meter = RaplMeter(host.root, clock=host.clock)
    host.set("intel-rapl:0", 1_000_000 + 5_000_000)
    host.set("intel-rapl:0:0", 500_000 + 4_000_000)
    host.set("intel-rapl:0:1", 2_000_000 + 1_000_000)
    host.set("intel-rapl:1", 90_000_000)
    reading = read_after(host, meter, 100)
    assert (reading.energy_mj, reading.source, reading.gap) == (6_000, Source.SHARED, False)


def test_a_wrap_is_undone(host: Host) -> None:
    host.set("intel-rapl:0", RANGE_UJ - 1_000_000)
    meter = RaplMeter(host.root, clock=host.clock)
    host.set("intel-rapl:0", 2_000_000)
    reading = read_after(host, meter, 100)
    assert (reading.energy_mj, reading.gap, meter.health().state) == (3_000, False, MeterState.OK)


def test_after_so_long_that_a_counter_may_have_wrapped_twice_there_is_a_gap(host: Host) -> None:
    meter = RaplMeter(host.root, clock=host.clock)
    before = read_after(host, meter, 100)
    host.set("intel-rapl:0", 5_000_000)
    after = read_after(host, meter, RANGE_UJ // 2_000_000)
    assert (after.energy_mj, after.gap) == (before.energy_mj, True)
    assert not read_after(host, meter, 100).gap


def test_a_counter_that_begins_anew_is_a_gap_and_not_counted(host: Host) -> None:
    host.set("intel-rapl:0", 200_000_000_000)
    meter = RaplMeter(host.root, clock=host.clock)
    before = read_after(host, meter, 100)
    host.set("intel-rapl:0", 0)
    after = read_after(host, meter, 100)
    assert (after.energy_mj, after.gap, meter.health().state) == (before.energy_mj, True, MeterState.RESET)
    host.set("intel-rapl:0", 7_000_000)
    assert read_after(host, meter, 100).energy_mj == before.energy_mj + 7_000


def test_fractions_of_a_millijoule_are_carried_on(host: Host) -> None:
    meter = RaplMeter(host.root, clock=host.clock)
    readings = []
    for number in range(1, 11):
        host.set("intel-rapl:0", 1_000_000 + number * 1_500)
        readings.append(read_after(host, meter, 10).energy_mj)
    assert readings[-1] == 15
    assert all(later - earlier in (1, 2) for earlier, later in pairwise(readings))


def test_a_zone_that_goes_away_is_lost_and_a_gap_when_it_is_back(host: Host) -> None:
    meter = RaplMeter(host.root, clock=host.clock)
    file = host.root / "intel-rapl:0" / "energy_uj"
    file.write_text("")
    host.now_ns += 100 * MS
    assert meter.read() is None
    assert meter.health().state is MeterState.LOST
    file.unlink()
    host.set("intel-rapl:0", 5_000_000)
    reading = read_after(host, meter, 1_000)
    assert (reading.gap, reading.energy_mj, meter.health().state) == (True, 0, MeterState.OK)
    meter.close()


def test_no_zones_and_unreadable_ones_are_explained(host: Host, tmp_path: Path) -> None:
    with pytest.raises(MeterUnavailable, match=r"no RAPL counters.*virtual machines"):
        RaplMeter(tmp_path / "nothing")
    (host.root / "intel-rapl:0" / "energy_uj").write_text("not a number\n")
    with pytest.raises(MeterUnavailable, match="package-0: cannot be read"):
        RaplMeter(host.root)


def test_a_file_for_root_only_says_what_to_do(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def refuse(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(path, encoding, errors)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(MeterUnavailable, match=r"for root only.*wattline agent.*root"):
        RaplMeter(host.root)
