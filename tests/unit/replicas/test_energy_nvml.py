"""The GPU counter against a scripted driver: edges every 100 ms, resets, stalls, losses, MIG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from replicas.energy.meter import MeterScope, MeterState, Reading, Source, hold_the_same
from replicas.energy.nvml import GpuDescription, NvmlMeter, discover_gpus
from replicas.energy.nvml_gpu import FieldValue
from replicas.errors import MeterUnavailable

MS = 1_000_000
UUID = "GPU-5ce7a0aa"
OTHER = "GPU-9d0f17b2"


class DriverError(Exception):
    """Stands for pynvml.NVMLError."""


@dataclass
class FakeNumber:
    uiVal: int


@dataclass
class FakeField:
    nvmlReturn: int
    value: FakeNumber


@dataclass
class FakeC2c:
    isC2cEnabled: int


@dataclass
class FakeGpu:
    """A counter in mJ that moves every 100 ms, `phase_ms` after the full tenth; 200 W unless told."""

    uuid: str = UUID
    power_w: int = 200
    limit_w: int = 700
    phase_ms: int = 0
    is_mig: bool = False
    is_module: bool = False
    is_lost: bool = False
    has_counter: bool = True
    sensor_w: int | None = None
    stalled_at_ms: int | None = None
    offset_mj: int = 1_000_000

    def counter_mj(self, now_ms: int) -> int:
        now_ms = now_ms if self.stalled_at_ms is None else self.stalled_at_ms
        edges = (now_ms - self.phase_ms) // 100
        return self.offset_mj + edges * 100 * self.power_w


@dataclass
class FakeNvml:
    """The calls of pynvml that the meter makes, on a clock that the test moves."""

    gpus: Sequence[FakeGpu] = field(default_factory=lambda: [FakeGpu()])
    now_ms: int = 0
    has_driver: bool = True
    users: int = 0
    NVMLError: type[Exception] = DriverError

    def clock_ns(self) -> int:
        return self.now_ms * MS

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.has_driver:
            raise DriverError("NVML Shared Library Not Found")
        self.users += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.users -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> object:  # noqa: N802
        for gpu in self.gpus:
            if gpu.uuid == uuid and not gpu.is_lost:
                return gpu
        raise DriverError("Not Found")

    def nvmlDeviceGetUUID(self, handle: object, /) -> str:  # noqa: N802
        return self._gpu(handle).uuid

    def nvmlDeviceGetName(self, handle: object, /) -> str:  # noqa: N802
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetMigMode(self, handle: object, /) -> Sequence[int]:  # noqa: N802
        return [int(self._gpu(handle).is_mig)] * 2

    def nvmlDeviceGetPowerManagementLimit(self, handle: object, /) -> int:  # noqa: N802
        return self._gpu(handle).limit_w * 1000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object, /) -> int:  # noqa: N802
        gpu = self._gpu(handle)
        if gpu.is_lost or not gpu.has_counter:
            raise DriverError("GPU is lost" if gpu.is_lost else "Not Supported")
        return gpu.counter_mj(self.now_ms)

    def nvmlDeviceGetC2cModeInfoV(self, handle: object, /) -> FakeC2c:  # noqa: N802
        if not self._gpu(handle).is_module:
            raise DriverError("Not Supported")
        return FakeC2c(isC2cEnabled=1)

    def nvmlDeviceGetFieldValues(  # noqa: N802
        self, handle: object, fields: list[tuple[int, int]], /
    ) -> Sequence[FieldValue]:
        gpu = self._gpu(handle)
        assert fields == [(186, int(gpu.is_module))]
        sensor_w = gpu.sensor_w
        return (
            [FakeField(nvmlReturn=3, value=FakeNumber(0))]
            if sensor_w is None
            else [FakeField(nvmlReturn=0, value=FakeNumber(1000 * sensor_w))]
        )

    def nvmlDeviceGetPowerUsage(self, handle: object, /) -> int:  # noqa: N802
        sensor_w = self._gpu(handle).sensor_w
        if sensor_w is None:
            raise DriverError("Not Supported")
        return 1000 * sensor_w

    def _gpu(self, handle: object) -> FakeGpu:
        assert isinstance(handle, FakeGpu)
        return handle


def make_meter(nvml: FakeNvml) -> NvmlMeter:
    return NvmlMeter([gpu.uuid for gpu in nvml.gpus], nvml, clock=nvml.clock_ns)


def poll_until(nvml: FakeNvml, meter: NvmlMeter, end_ms: int, *, poll_ms: int = 20) -> list[Reading]:
    """Different readings, in order; a reading that goes away is not in it."""
    edges: list[Reading] = []
    while nvml.now_ms < end_ms:
        nvml.now_ms += poll_ms
        reading = meter.read()
        if reading is not None and (not edges or reading.t_ns != edges[-1].t_ns):
            edges.append(reading)
    return edges


def test_readings_are_the_edges_of_the_counter_known_to_half_a_poll() -> None:
    nvml = FakeNvml(now_ms=50)
    edges = poll_until(nvml, make_meter(nvml), 450)
    assert [reading.t_ns // MS for reading in edges] == [100, 200, 300, 400]
    steps_mj = [b.energy_mj - a.energy_mj for a, b in pairwise(edges)]
    assert steps_mj == [20_000, 20_000, 20_000]
    assert {reading.source for reading in edges} == {Source.COUNTER}
    assert not any(reading.gap for reading in edges)


def test_the_first_reading_comes_with_the_first_edge() -> None:
    nvml = FakeNvml(now_ms=50)
    meter = make_meter(nvml)
    nvml.now_ms = 90
    assert meter.read() is None
    nvml.now_ms = 110
    assert meter.read() is not None


def test_gpus_are_summed_when_all_of_them_have_moved() -> None:
    nvml = FakeNvml(gpus=[FakeGpu(), FakeGpu(uuid=OTHER, power_w=300, phase_ms=60)], now_ms=10)
    edges = poll_until(nvml, make_meter(nvml), 490)
    assert [b.energy_mj - a.energy_mj for a, b in pairwise(edges)] == [50_000] * 3
    assert [b.t_ns - a.t_ns for a, b in pairwise(edges)] == [100 * MS] * 3


def test_a_counter_that_starts_again_is_a_gap_and_never_falls() -> None:
    nvml = FakeNvml()
    meter = make_meter(nvml)
    before = poll_until(nvml, meter, 320)[-1]
    nvml.gpus[0].offset_mj = -50_000
    after = poll_until(nvml, meter, 620)
    assert [reading.gap for reading in after] == [True, False, False, False]
    assert [reading.energy_mj - before.energy_mj for reading in after] == [0, 20_000, 40_000, 60_000]


def test_a_jump_above_the_power_limit_is_a_gap_and_not_counted() -> None:
    nvml = FakeNvml()
    meter = make_meter(nvml)
    before = poll_until(nvml, meter, 320)[-1]
    nvml.gpus[0].offset_mj += 10_000_000
    after = poll_until(nvml, meter, 520)
    assert after[0].gap
    assert after[0].energy_mj == before.energy_mj
    assert after[1].energy_mj == before.energy_mj + 20_000


def test_a_stall_gives_none_and_its_energy_comes_with_the_next_edge() -> None:
    nvml = FakeNvml()
    meter = make_meter(nvml)
    before = poll_until(nvml, meter, 320)[-1]
    nvml.gpus[0].stalled_at_ms = 320
    assert poll_until(nvml, meter, 2_300) == [before]
    assert poll_until(nvml, meter, 3_000) == []
    nvml.gpus[0].stalled_at_ms = None
    (after,) = poll_until(nvml, meter, 3_020)
    assert not after.gap
    assert after.energy_mj - before.energy_mj == 27 * 20_000


def test_a_lost_gpu_gives_none_and_a_gap_when_it_is_back() -> None:
    nvml = FakeNvml()
    meter = make_meter(nvml)
    before = poll_until(nvml, meter, 320)[-1]
    nvml.gpus[0].is_lost = True
    assert poll_until(nvml, meter, 1_000) == []
    nvml.gpus[0].is_lost = False
    after = poll_until(nvml, meter, 2_200)
    gaps = [reading.gap for reading in after if reading.t_ns > before.t_ns]
    assert gaps[0]
    assert not any(gaps[1:])
    assert all(reading.energy_mj >= before.energy_mj for reading in after)


def test_a_clock_that_stands_still_changes_nothing() -> None:
    nvml = FakeNvml()
    meter = make_meter(nvml)
    last = poll_until(nvml, meter, 320)[-1]
    assert meter.read() == last
    nvml.now_ms -= 50
    assert meter.read() == last


def test_mig_is_refused_because_a_slice_has_no_meter() -> None:
    nvml = FakeNvml(gpus=[FakeGpu(is_mig=True)])
    with pytest.raises(MeterUnavailable, match="MIG is on"):
        make_meter(nvml)
    assert nvml.users == 0


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(MeterUnavailable, match="driver installed"):
        make_meter(FakeNvml(has_driver=False))
    with pytest.raises(MeterUnavailable, match="no energy counter"):
        make_meter(FakeNvml(gpus=[FakeGpu(has_counter=False)]))
    with pytest.raises(MeterUnavailable, match=r"not on this host.*nvidia-smi -L"):
        NvmlMeter([OTHER], FakeNvml())
    with pytest.raises(MeterUnavailable, match="no GPU named"):
        NvmlMeter([], FakeNvml())


def test_gpus_of_the_host_are_found_with_what_is_wrong_with_them() -> None:
    nvml = FakeNvml(gpus=[FakeGpu(), FakeGpu(uuid=OTHER, is_mig=True)])
    first, second = discover_gpus(nvml)
    assert first == GpuDescription(uuid=UUID, name="NVIDIA H100 80GB HBM3")
    assert second.unreadable.startswith("MIG is on")
    assert nvml.users == 0


def test_a_counter_that_stands_still_is_replaced_by_power_and_right_again_afterwards() -> None:
    """The sensor says 250 W of a true 200 W; what it counted too much is taken off afterwards."""
    nvml = FakeNvml(gpus=[FakeGpu(sensor_w=250)])
    meter = make_meter(nvml)
    before = poll_until(nvml, meter, 320)[-1]
    nvml.gpus[0].stalled_at_ms = 320
    edges = poll_until(nvml, meter, 6_300)
    assert meter.health().state is MeterState.STALE
    assert edges[-1].source is Source.POWER_INTEGRATED
    assert edges[-1].energy_mj - before.energy_mj == pytest.approx(250 * 6_000, rel=0.02)
    nvml.gpus[0].stalled_at_ms = None
    after = poll_until(nvml, meter, 12_000)
    energies = [reading.energy_mj for reading in after]
    assert energies == sorted(energies)
    assert after[-1].energy_mj - before.energy_mj == 200 * (after[-1].t_ns - before.t_ns) // MS
    assert (after[-1].source, meter.health().state) == (Source.COUNTER, MeterState.OK)
    assert not any(reading.gap for reading in after)


def test_a_gpu_without_counter_is_metered_by_its_power() -> None:
    nvml = FakeNvml(gpus=[FakeGpu(has_counter=False, sensor_w=250)])
    meter = make_meter(nvml)
    edges = poll_until(nvml, meter, 3_000)
    assert {reading.source for reading in edges} == {Source.POWER_INTEGRATED}
    joules = (edges[-1].energy_mj - edges[0].energy_mj) / 1e3
    assert joules == pytest.approx(250 * (edges[-1].t_ns - edges[0].t_ns) / 1e9, rel=0.01)
    assert meter.health().state is MeterState.OK
    (described,) = discover_gpus(nvml)
    assert (described.unreadable, described.has_counter) == ("", False)


def test_the_counter_is_checked_against_integrated_power() -> None:
    nvml = FakeNvml(gpus=[FakeGpu(sensor_w=160)])
    meter = make_meter(nvml)
    assert meter.health().check_ratio is None
    poll_until(nvml, meter, 5_000)
    assert meter.health().check_ratio == pytest.approx(200 / 160, rel=0.02)


def test_power_that_cannot_be_is_not_believed() -> None:
    nvml = FakeNvml(gpus=[FakeGpu(has_counter=False, sensor_w=5_000)])
    with pytest.raises(MeterUnavailable, match="no energy counter"):
        make_meter(nvml)


def test_the_state_tells_of_a_reset_for_a_minute_and_of_a_loss_while_it_lasts() -> None:
    nvml = FakeNvml()
    meter = make_meter(nvml)
    poll_until(nvml, meter, 320)
    assert meter.health().state is MeterState.OK
    nvml.gpus[0].offset_mj = -50_000
    poll_until(nvml, meter, 620)
    assert meter.health().state is MeterState.RESET
    poll_until(nvml, meter, 61_000)
    assert meter.health().state is MeterState.OK
    nvml.gpus[0].is_lost = True
    poll_until(nvml, meter, 61_100)
    assert meter.health().state is MeterState.LOST


def test_a_gpu_on_a_module_with_its_cpu_is_labelled_so_and_its_power_is_the_modules() -> None:
    nvml = FakeNvml(gpus=[FakeGpu(is_module=True, power_w=900, sensor_w=900), FakeGpu(uuid=OTHER)])
    assert [gpu.scope for gpu in discover_gpus(nvml)] == [MeterScope.MODULE, MeterScope.DEVICE]
    assert NvmlMeter([OTHER], nvml, clock=nvml.clock_ns).scope is MeterScope.DEVICE
    meter = NvmlMeter([UUID], nvml, clock=nvml.clock_ns)
    assert meter.scope is MeterScope.MODULE
    poll_until(nvml, meter, 3000)
    assert meter.health().check_ratio == pytest.approx(1.0, rel=0.05)
    assert [hold_the_same(meter.scope, other) for other in MeterScope] == [False, False, True]
