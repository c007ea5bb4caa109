"""The meter through Zeus: its arithmetic by itself, and Zeus' own AMD classes over a scripted driver."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from replicas.energy.meter import MeterScope, MeterState, Reading, Source
from replicas.energy.zeus_devices import (
    PowerIntegral,
    ZeusDescription,
    ZeusDevices,
    discover_devices,
    gpu_counts,
    open_devices,
    soc_count,
)
from replicas.energy.zeus_meter import ZeusMeter
from replicas.errors import MeterUnavailable

MS = 1_000_000
NS = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def test_counters_are_added_up_and_one_that_begins_anew_is_a_gap() -> None:
    clock, counts_mj = Clock(), [500, 70]
    meter = ZeusMeter(ZeusDevices([lambda _: counts_mj[0], lambda _: counts_mj[1]]), clock=clock)
    counts_mj[:] = [800, 90]
    clock.now_ns = 1 * NS
    assert meter.read() == Reading(t_ns=NS, energy_mj=320, source=Source.SHARED)
    counts_mj[0] = 0
    clock.now_ns = 2 * NS
    assert meter.read() == Reading(t_ns=2 * NS, energy_mj=320, source=Source.SHARED, gap=True)
    assert meter.health().state is MeterState.RESET
    counts_mj[0] = 40
    clock.now_ns = 3 * NS
    assert meter.read() == Reading(t_ns=3 * NS, energy_mj=360, source=Source.SHARED)


def test_a_device_that_goes_away_makes_a_gap_when_it_is_back() -> None:
    clock = Clock()
    answers: list[int | Exception] = [100, OSError("gone"), 900, 950]

    def count(_: int) -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    meter = ZeusMeter(ZeusDevices([count]), clock=clock)
    clock.now_ns = 1 * NS
    assert meter.read() is None
    assert meter.health().state is MeterState.LOST
    clock.now_ns += 500 * MS
    assert meter.read() is None
    clock.now_ns = 3 * NS
    assert meter.read() == Reading(t_ns=3 * NS, energy_mj=0, source=Source.SHARED, gap=True)
    clock.now_ns = 4 * NS
    assert meter.read() == Reading(t_ns=4 * NS, energy_mj=50, source=Source.SHARED)


def test_power_is_integrated_by_the_mean_of_two_looks() -> None:
    powers_mw = [100_000, 300_000, 300_000]
    integral = PowerIntegral(lambda _: powers_mw.pop(0), 0, 0)
    assert integral.energy_mj(NS) == 200_000
    assert integral.energy_mj(NS + 100 * MS) == 230_000


@pytest.mark.parametrize(
    ("rails", "energy_mj"), [((None, None, 900.7), 900), ((200.0, 300.0, None), 500), ((7.0, 5.0, 20.0), 20)]
)
def test_a_board_is_its_total_rail_or_those_it_has(
    rails: tuple[float | None, float | None, float | None], energy_mj: int
) -> None:
    cpu_mj, gpu_mj, total_mj = rails
    measured = SimpleNamespace(cpu_energy_mj=cpu_mj, gpu_energy_mj=gpu_mj, total_energy_mj=total_mj)
    soc = SimpleNamespace(get_total_energy_consumption=lambda timeout: measured)
    assert soc_count(soc)(0) == energy_mj


def test_without_zeus_the_meter_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MeterUnavailable, match=r"pip install 'wattline\[zeus\]'"):
        open_devices(0)


class RefusedError(Exception):
    """Stands for zeus.exception.ZeusBaseError."""


class FourGpus:
    """One with a counter, one with power alone, a chiplet without either, and one that is gone."""

    def __len__(self) -> int:
        return 4

    def get_name(self, index: int) -> str:
        if index == 3:
            raise RefusedError("the device is gone")
        return f"MI250X {index}"

    def supports_get_total_energy_consumption(self, index: int) -> bool:
        return index == 0

    def get_instant_power_usage(self, index: int) -> int:
        raise RefusedError("no such sensor")

    def get_average_power_usage(self, index: int) -> int:
        if index != 1:
            raise RefusedError("no such sensor")
        return 400_000


def test_each_device_is_named_with_how_it_is_counted_or_why_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = {
        "zeus.device": SimpleNamespace(get_gpus=FourGpus),
        "zeus.exception": SimpleNamespace(ZeusBaseError=RefusedError),
    }
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    chiplet = "MI250X 2: shows neither energy nor power; the other chiplet of its package may count it"
    assert discover_devices() == [
        ZeusDescription("gpu 0", "MI250X 0: by its energy counter"),
        ZeusDescription("gpu 1", "MI250X 1: by its power, integrated"),
        ZeusDescription("gpu 2", chiplet, is_readable=False),
        ZeusDescription("gpu 3", "cannot be read: the device is gone", is_readable=False),
    ]


@dataclass
class ScriptedAmdSmi:
    """The calls of `amdsmi` that Zeus' AMD classes make: an MI250 of two chiplets, and one MI300X.

    Counters count in units of 15.3 uJ; only the even chiplet has a sensor.
    """

    time_s: float = 0.0
    power_w: dict[int, int | str] = field(default_factory=lambda: {0: 400, 1: "N/A", 2: 700})
    AmdSmiLibraryException: type[Exception] = RuntimeError
    AmdSmiException: type[Exception] = RuntimeError

    def amdsmi_shut_down(self) -> None:
        """Zeus calls it when its objects go."""

    def amdsmi_get_processor_handles(self) -> list[int]:
        return [0, 1, 2]

    def amdsmi_get_gpu_enumeration_info(self, handle: int) -> dict[str, int]:
        return {"hip_id": handle}

    def amdsmi_get_gpu_asic_info(self, handle: int) -> dict[str, str]:
        return {"market_name": "AMD Instinct MI300X" if handle == 2 else "AMD Instinct MI250X"}

    def amdsmi_get_power_info(self, handle: int) -> dict[str, int | str]:
        return {"current_socket_power": self.power_w[handle], "average_socket_power": "N/A"}

    def amdsmi_get_energy_count(self, handle: int) -> dict[str, float]:
        power_w = self.power_w[handle]
        counted_uj = self.time_s * power_w * 1e6 if isinstance(power_w, int) and handle != 2 else 0.0
        return {"energy_accumulator": counted_uj / 15.3, "counter_resolution": 15.3}


def test_zeus_own_amd_classes_count_a_dual_chiplet_once_and_integrate_where_its_counter_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Zeus finds that the counter of the MI300X stands still, so its power is integrated."""
    amd = pytest.importorskip("zeus.device.gpu.amd", reason="the extra zeus is not installed")
    library = ScriptedAmdSmi()
    monkeypatch.setattr(amd, "amdsmi", library)
    monkeypatch.setattr(amd, "time", SimpleNamespace(sleep=lambda s: setattr(library, "time_s", s)))
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    amd._hip_to_amdsmi_handle.cache_clear()
    gpus = amd.AMDGPUs.__new__(amd.AMDGPUs)
    gpus._init_gpus()
    errors = (importlib.import_module("zeus.exception").ZeusBaseError,)
    clock = Clock()
    meter = ZeusMeter(ZeusDevices(gpu_counts(gpus, 0, errors), errors=errors), clock=clock)
    library.time_s += 2.0
    clock.now_ns = 2 * NS
    reading = meter.read()
    assert reading is not None
    assert reading.energy_mj == pytest.approx(2_000 * (400 + 700), abs=2)
    assert meter.scope is MeterScope.DEVICE


def test_zeus_itself_says_why_there_is_nothing_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zeus.device", reason="the extra zeus is not installed")
    gpu, soc = importlib.import_module("zeus.device.gpu"), importlib.import_module("zeus.device.soc")
    for name in ("nvml_is_available", "amdsmi_is_available"):
        monkeypatch.setattr(gpu, name, lambda: False)
    monkeypatch.setattr(soc, "jetson_is_available", lambda: False)
    with pytest.raises(MeterUnavailable, match=r"NVML and AMDSMI unavailable.*No observable SoC"):
        open_devices(0)
