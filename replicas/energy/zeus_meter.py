"""AMD GPUs and Jetson boards, through Zeus (https://ml.energy/zeus): the optional extra `zeus`.

The only file that imports it, and only when such a meter is asked for: Zeus brings 300 MB of packages and a
second of imports. NVIDIA GPUs have `nvml.py`. Used by the energy agent alone.
"""

from __future__ import annotations

import importlib
import queue
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from replicas.energy.meter import MeterHealth, MeterScope, MeterState, Reading, Source
from replicas.errors import MeterUnavailable

_PLAUSIBLE_W = 2_000
"""Of one device: no GPU or board draws as much."""
_SLACK_NS = 1_000_000_000
_RETRY_NS = 1_000_000_000
_RESET_SHOWN_NS = 60_000_000_000
_SOC_TIMEOUT_S = 1.0
_PJ_PER_MJ = 1_000_000_000
_INSTALL = "pip install 'wattline[zeus]'"


class ZeusGpus(Protocol):
    """The part of `zeus.device.gpu.GPUs` that is used here: millijoules and milliwatts by index."""

    def __len__(self) -> int: ...
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


class ZeusMeter:
    """Sum of all devices that Zeus shows on this host, whoever uses them: hence its source `shared`.

    A counter that falls or runs away begins anew, with a gap. A device that cannot be read makes the whole
    unknown until it can, and then there is a gap. `devices` None: those Zeus finds.
    """

    def __init__(
        self, devices: ZeusDevices | None = None, *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        devices = devices or open_devices(clock())
        self.scope = devices.scope
        self._counts = devices.counts
        self._errors: tuple[type[Exception], ...] = (
            *devices.errors,
            OSError,
            queue.Empty,
            MeterUnavailable,
        )
        self._clock = clock
        self._read_ns = clock()
        self._last_mj = [count(self._read_ns) for count in self._counts]
        self._energy_mj = 0
        self._is_lost = False
        self._retry_ns = self._reset_until_ns = 0

    def read(self) -> Reading | None:
        now_ns = self._clock()
        if self._is_lost and now_ns < self._retry_ns:
            return None
        try:
            counts_mj = [count(now_ns) for count in self._counts]
        except self._errors:
            self._is_lost, self._retry_ns = True, now_ns + _RETRY_NS
            return None
        deltas_mj = [new - last for new, last in zip(counts_mj, self._last_mj, strict=True)]
        most_mj = _PLAUSIBLE_W * (now_ns - self._read_ns + _SLACK_NS) // 1_000_000
        has_reset = not all(0 <= delta_mj <= most_mj for delta_mj in deltas_mj)
        has_gap = has_reset or self._is_lost
        if has_reset:
            self._reset_until_ns = now_ns + _RESET_SHOWN_NS
        self._energy_mj += 0 if has_gap else sum(deltas_mj)
        self._last_mj, self._read_ns, self._is_lost = counts_mj, now_ns, False
        return Reading(t_ns=now_ns, energy_mj=self._energy_mj, source=Source.SHARED, gap=has_gap)

    def health(self) -> MeterHealth:
        if self._is_lost:
            return MeterHealth(state=MeterState.LOST)
        return MeterHealth(state=MeterState.RESET if self._read_ns < self._reset_until_ns else MeterState.OK)

    def close(self) -> None:
        """Zeus ends what it started with the process."""


def open_devices(now_ns: int) -> ZeusDevices:
    """What Zeus can count here. MeterUnavailable, in Zeus' words, where that is nothing."""
    try:
        device = importlib.import_module("zeus.device")
        errors: tuple[type[Exception], ...] = (importlib.import_module("zeus.exception").ZeusBaseError,)
    except ImportError as error:
        raise MeterUnavailable(f"meter zeus: Zeus is not installed ({error}); {_INSTALL}") from error
    try:
        gpus = device.get_gpus()
    except errors as no_gpus:
        try:
            soc = device.get_soc()
        except errors as no_soc:
            raise MeterUnavailable(f"meter zeus: {no_gpus} {no_soc}") from no_soc
        return ZeusDevices([soc_count(soc)], MeterScope.MODULE, errors)
    if type(gpus).__module__.endswith(".nvidia"):
        raise MeterUnavailable("meter zeus: NVIDIA GPUs are read without Zeus; set energy.meter to nvml")
    return ZeusDevices(gpu_counts(gpus, now_ns, errors), MeterScope.DEVICE, errors)


def gpu_counts(gpus: ZeusGpus, now_ns: int, errors: tuple[type[Exception], ...]) -> list[Count]:
    """Counters where Zeus trusts them, integrated power elsewhere.

    A chiplet without either is counted by its neighbour. MeterUnavailable if none of them has any.
    """
    counts = []
    for index in range(len(gpus)):
        if gpus.supports_get_total_energy_consumption(index):
            counts.append(_counter(gpus, index))
            continue
        for read_mw in (gpus.get_instant_power_usage, gpus.get_average_power_usage):
            try:
                read_mw(index)
            except errors:
                continue
            counts.append(PowerIntegral(read_mw, index, now_ns).energy_mj)
            break
    if not counts:
        raise MeterUnavailable(f"meter zeus: none of {len(gpus)} GPUs shows energy or power")
    return counts


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
