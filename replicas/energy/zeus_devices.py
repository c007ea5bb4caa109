"""The devices that Zeus (https://ml.energy/zeus) shows on this host: AMD GPUs, or a Jetson board.

The only file that imports it, and only when it is asked for: Zeus is the optional extra `zeus`, 300 MB of
packages and a second of imports. NVIDIA GPUs have `nvml.py`. Used by `zeus_meter.py` and the survey.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from replicas.energy.meter import MeterScope
from replicas.errors import MeterUnavailable

_SOC_TIMEOUT_S = 1.0
_PJ_PER_MJ = 1_000_000_000
_INSTALL = "pip install 'wattline[zeus]'"


class ZeusGpus(Protocol):
    """The part of `zeus.device.gpu.GPUs` that is used here: millijoules and milliwatts by index."""

    def __len__(self) -> int: ...
    def get_name(self, gpu_index: int, /) -> str: ...
    def supports_get_total_energy_consumption(self, gpu_index: int, /) -> bool: ...
    def get_total_energy_consumption(self, gpu_index: int, /) -> int: ...
    def get_instant_power_usage(self, gpu_index: int, /) -> int: ...
    def get_average_power_usage(self, gpu_index: int, /) -> int: ...


class SocMeasurement(Protocol):
    """What a Jetson board took since Zeus began to look; None where it has no such rail."""

    cpu_energy_mj: float | None
    gpu_energy_mj: float | None
    total_energy_mj: float | None


class ZeusSoc(Protocol):
    """The part of `zeus.device.soc.jetson.Jetson` that is used here."""

    def get_total_energy_consumption(self, timeout: float) -> SocMeasurement: ...


Count = Callable[[int], int]
"""Millijoules of one device up to a time, which never fall unless its counter begins anew."""


class ZeusDevices(NamedTuple):
    """What Zeus shows on this host. `errors` is what it raises for a device that cannot be read."""

    counts: Sequence[Count]
    scope: MeterScope = MeterScope.DEVICE
    errors: tuple[type[Exception], ...] = ()


class ZeusDescription(NamedTuple):
    """A device that Zeus shows: `detail` is its name and how it is counted, or why it cannot be."""

    device: str
    detail: str
    is_readable: bool = True


def discover_devices() -> list[ZeusDescription]:
    """Each by itself; the meter is their sum. MeterUnavailable, in Zeus' words, where there is none."""
    found, errors = _find()
    if isinstance(found, _Board):
        return [ZeusDescription("board", "a Jetson board, CPU and memory included: by its power rails")]
    return [_describe(found, index, errors) for index in range(len(found))]


def open_devices(now_ns: int) -> ZeusDevices:
    """What Zeus can count here. MeterUnavailable, in Zeus' words, where that is nothing."""
    found, errors = _find()
    if isinstance(found, _Board):
        return ZeusDevices([soc_count(found.soc)], MeterScope.MODULE, errors)
    return ZeusDevices(gpu_counts(found, now_ns, errors), MeterScope.DEVICE, errors)


class _Board(NamedTuple):
    soc: ZeusSoc


def _find() -> tuple[ZeusGpus | _Board, tuple[type[Exception], ...]]:
    """What Zeus finds here, and the errors it raises of it."""
    try:
        device = importlib.import_module("zeus.device")
        errors: tuple[type[Exception], ...] = (importlib.import_module("zeus.exception").ZeusBaseError,)
    except ImportError as error:
        raise MeterUnavailable(
            "meter zeus: Zeus, which reads AMD GPUs and Jetson boards, is not installed "
            f"({error}); {_INSTALL}"
        ) from error
    try:
        gpus = device.get_gpus()
    except errors as no_gpus:
        try:
            return _Board(device.get_soc()), errors
        except errors as no_soc:
            raise MeterUnavailable(f"meter zeus: {no_gpus} {no_soc}") from no_soc
    if type(gpus).__module__.endswith(".nvidia"):
        raise MeterUnavailable("meter zeus: NVIDIA GPUs are read without Zeus; set energy.meter to nvml")
    return gpus, errors


def _describe(gpus: ZeusGpus, index: int, errors: tuple[type[Exception], ...]) -> ZeusDescription:
    device = f"gpu {index}"
    try:
        name = gpus.get_name(index)
        if gpus.supports_get_total_energy_consumption(index):
            return ZeusDescription(device, f"{name}: by its energy counter")
        if _power_reader(gpus, index, errors):
            return ZeusDescription(device, f"{name}: by its power, integrated")
    except errors as error:
        return ZeusDescription(device, f"cannot be read: {error}", is_readable=False)
    nothing = f"{name}: shows neither energy nor power; the other chiplet of its package may count it"
    return ZeusDescription(device, nothing, is_readable=False)


def gpu_counts(gpus: ZeusGpus, now_ns: int, errors: tuple[type[Exception], ...]) -> list[Count]:
    """Counters where Zeus trusts them, integrated power elsewhere.

    A chiplet without either is counted by its neighbour. MeterUnavailable if none of them has any.
    """
    counts = []
    for index in range(len(gpus)):
        if gpus.supports_get_total_energy_consumption(index):
            counts.append(_counter(gpus, index))
        elif read_mw := _power_reader(gpus, index, errors):
            counts.append(PowerIntegral(read_mw, index, now_ns).energy_mj)
    if not counts:
        raise MeterUnavailable(f"meter zeus: none of {len(gpus)} GPUs shows energy or power")
    return counts


def _power_reader(
    gpus: ZeusGpus, index: int, errors: tuple[type[Exception], ...]
) -> Callable[[int], int] | None:
    """The better of those that answer for this GPU."""
    for read_mw in (gpus.get_instant_power_usage, gpus.get_average_power_usage):
        try:
            read_mw(index)
        except errors:
            continue
        return read_mw
    return None


def soc_count(soc: ZeusSoc) -> Count:
    """A board by its total rail, else by those of CPU and GPU."""

    def energy_mj(_: int) -> int:
        measured = soc.get_total_energy_consumption(timeout=_SOC_TIMEOUT_S)
        if measured.total_energy_mj is not None:
            return int(measured.total_energy_mj)
        rails_mj = [one for one in (measured.cpu_energy_mj, measured.gpu_energy_mj) if one is not None]
        if not rails_mj:
            raise MeterUnavailable("meter zeus: this board has no power rail that can be read")
        return int(sum(rails_mj))

    return energy_mj


class PowerIntegral:
    """Energy of a device that shows only power: between two looks it drew the mean of both."""

    def __init__(self, read_mw: Callable[[int], int], index: int, now_ns: int) -> None:
        self._read_mw = read_mw
        self._index = index
        self._last_ns, self._last_mw = now_ns, read_mw(index)
        self._energy_pj = 0

    def energy_mj(self, now_ns: int) -> int:
        power_mw = self._read_mw(self._index)
        self._energy_pj += (power_mw + self._last_mw) * (now_ns - self._last_ns) // 2
        self._last_ns, self._last_mw = now_ns, power_mw
        return self._energy_pj // _PJ_PER_MJ


def _counter(gpus: ZeusGpus, index: int) -> Count:
    return lambda _: gpus.get_total_energy_consumption(index)
