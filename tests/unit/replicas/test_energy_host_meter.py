"""The meter of a host beside those of its devices, over a made-up powercap folder: who gets how much."""

from __future__ import annotations

from pathlib import Path

import pytest

from replicas.energy.cpu_model import CpuModelMeter
from replicas.energy.host_meter import HostMeter, HostSeat, open_host_meter
from replicas.energy.meter import Meter
from replicas.energy.rapl import RaplMeter
from replicas.energy.replay import FakeMeter

MS = 1_000_000
GPU = FakeMeter(((0, 100.0),), clock=lambda: 0)
CPU_ESTIMATE = CpuModelMeter([], static_w=1.0, core_w=1.0, clock=lambda: 0)


class Host:
    """A powercap folder with one package, whose counter the test moves with its clock."""

    def __init__(self, root: Path) -> None:
        self.now_ns = 0
        self.energy_mj = 0
        self.folder = root / "intel-rapl:0"
        self.folder.mkdir()
        (self.folder / "name").write_text("package-0\n")
        (self.folder / "max_energy_range_uj").write_text("262143328850\n")
        self.draw(0)
        self.rapl = RaplMeter(root, clock=lambda: self.now_ns)
        self.meter = HostMeter(self.rapl)

    def take(self, seat: HostSeat, power_w: float) -> int | None:
        """The host is read, then the devices have an edge."""
        self.meter.poll()
        return seat.take_mj(power_w)

    def draw(self, energy_mj: int) -> None:
        self.now_ns += 100 * MS
        self.energy_mj += energy_mj
        (self.folder / "energy_uj").write_text(f"{1000 * self.energy_mj}\n")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_lone_group_has_all_that_the_host_draws(host: Host) -> None:
    seat = host.meter.seat(GPU)
    assert host.take(seat, 100.0) is None
    host.draw(7_000)
    assert host.take(seat, 100.0) == 7_000
    assert host.take(seat, 100.0) == 7_000
    host.draw(1)
    assert host.take(seat, 100.0) == 7_001


def test_two_groups_have_it_by_their_power_and_nothing_is_lost(host: Host) -> None:
    one, other = host.meter.seat(GPU), host.meter.seat(GPU)
    for seat, power_w in ((one, 300.0), (other, 100.0)):
        host.take(seat, power_w)
    host.take(other, 100.0)
    for _ in range(40):
        host.draw(101)
        host.take(one, 300.0)
    ones_mj, others_mj = host.take(one, 300.0), host.take(other, 100.0)
    assert (ones_mj, others_mj) == (3 * 1_010, 1_010)


def test_a_host_that_cannot_be_read_for_a_while_counts_anew(host: Host) -> None:
    seat = host.meter.seat(GPU)
    host.take(seat, 1.0)
    host.draw(5)
    (host.folder / "energy_uj").write_text("")
    assert host.take(seat, 1.0) is None
    host.draw(5)
    host.now_ns += 2_000 * MS
    assert host.take(seat, 1.0) is None
    host.draw(9)
    assert host.take(seat, 1.0) == 9


@pytest.mark.parametrize("kind", ["rapl", "cpu-model"])
def test_beside_a_meter_that_counts_cpus_itself_nobody_has_a_share(host: Host, kind: str) -> None:
    own: Meter = host.rapl if kind == "rapl" else CPU_ESTIMATE
    seat, blocker = host.meter.seat(GPU), host.meter.seat(own)
    for _ in range(3):
        host.draw(10)
        assert host.take(seat, 1.0) is None
        assert host.take(blocker, 1.0) is None
    blocker.leave()
    host.take(seat, 1.0)
    host.draw(10)
    assert host.take(seat, 1.0) == 10


def test_a_host_without_rapl_or_with_it_off_has_no_meter(host: Host, tmp_path: Path) -> None:
    assert open_host_meter("off", tmp_path) is None
    assert open_host_meter("rapl", tmp_path / "absent") is None
    assert open_host_meter("auto", tmp_path) is not None
