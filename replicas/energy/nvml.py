"""The energy counter of NVIDIA GPUs, through nvidia-ml-py. The only file that imports it.

GPUs are named by UUID, so what CUDA_VISIBLE_DEVICES hides is still found. The driver moves the counter about
every 100 ms; only those edges are readings, because between them the counter says nothing new. Used by the
energy agent alone: one process per host, made after any fork.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import pynvml

from replicas.energy.meter import Reading, Source
from replicas.errors import MeterUnavailable

_PLAUSIBLE = 1.3
_PERIOD_NS = 100_000_000
_FALLBACK_LIMIT_MW = 1_500_000
_STALL_NS = 2_000_000_000
_RETRY_NS = 1_000_000_000
_PJ_PER_MJ = 1_000_000_000


class NvmlLibrary(Protocol):
    """The part of pynvml that is used here. Energies are millijoules, powers milliwatts."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlShutdown(self) -> None: ...  # noqa: N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...  # noqa: N802
    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> object: ...  # noqa: N802
    def nvmlDeviceGetUUID(self, handle: object, /) -> str: ...  # noqa: N802
    def nvmlDeviceGetName(self, handle: object, /) -> str: ...  # noqa: N802
    def nvmlDeviceGetMigMode(self, handle: object, /) -> Sequence[int]: ...  # noqa: N802
    def nvmlDeviceGetPowerManagementLimit(self, handle: object, /) -> int: ...  # noqa: N802
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object, /) -> int: ...  # noqa: N802


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDescription:
    """A GPU of this host; `unreadable` says why its energy cannot be told, empty if it can."""

    uuid: str
    name: str
    unreadable: str = ""


def discover_gpus(nvml: NvmlLibrary = pynvml) -> list[GpuDescription]:
    """All GPUs of this host in the driver's order. MeterUnavailable without driver or library."""
    _init(nvml)
    try:
        return [_describe(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise MeterUnavailable(f"NVML cannot list the GPUs: {error}") from error
    finally:
        nvml.nvmlShutdown()


class NvmlMeter:
    """Sum of the energy counters of some GPUs. Raises MeterUnavailable where they cannot all be read.

    A reading is taken when every GPU has moved since the last one; the first of them is the start of the
    count, so no window begins between edges. Its time is known to half a poll. A counter that falls or jumps
    by more than 1.3 x the power limit allows starts a new epoch: what it lost is not guessed, the reading has
    `gap`. A GPU that cannot be read is looked for once a second; `read()` is None until it is back, and then
    there is a gap too. A counter that stands still for 2 s gives None; its energy comes with the next edge.
    """

    def __init__(
        self,
        uuids: Sequence[str],
        nvml: NvmlLibrary = pynvml,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if not uuids:
            raise MeterUnavailable("NVML meter: no GPU named; give at least one GPU UUID")
        _init(nvml)
        self._nvml = nvml
        self._clock = clock
        self._last: Reading | None = None
        self._polled_ns = clock()
        try:
            self._gpus = [_Gpu(nvml, uuid, self._polled_ns) for uuid in dict.fromkeys(uuids)]
        except MeterUnavailable:
            nvml.nvmlShutdown()
            raise

    def read(self) -> Reading | None:
        now_ns = self._clock()
        if now_ns <= self._polled_ns:
            return self._last
        edge_ns = (self._polled_ns + now_ns) // 2
        self._polled_ns = now_ns
        for gpu in self._gpus:
            gpu.poll(edge_ns)
        if any(gpu.is_lost or now_ns - gpu.moved_ns > _STALL_NS for gpu in self._gpus):
            return None
        if all(gpu.has_moved for gpu in self._gpus):
            gaps = [gpu.take_gap() for gpu in self._gpus]
            self._last = Reading(
                t_ns=edge_ns,
                energy_mj=sum(gpu.energy_mj for gpu in self._gpus),
                source=Source.COUNTER,
                gap=any(gaps),
            )
        return self._last

    def close(self) -> None:
        self._nvml.nvmlShutdown()


class _Gpu:
    """The counter of one GPU, made monotone."""

    def __init__(self, nvml: NvmlLibrary, uuid: str, now_ns: int) -> None:
        self._nvml = nvml
        self._uuid = uuid
        self._retry_ns = 0
        self.moved_ns = now_ns
        self.energy_mj = 0
        self.has_moved = False
        self.is_lost = False
        self._has_gap = False
        self._open()
        try:
            self._counter_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except nvml.NVMLError as error:
            raise MeterUnavailable(
                f"GPU {uuid} has no energy counter ({error}); Volta or newer is needed"
            ) from error

    def poll(self, now_ns: int) -> None:
        """Look at the counter; `now_ns` is taken as the time of an edge found by it."""
        try:
            if self.is_lost:
                if now_ns < self._retry_ns:
                    return
                self._retry_ns = now_ns + _RETRY_NS
                self._nvml.nvmlInit()
                self._open()
            counter_mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except (self._nvml.NVMLError, MeterUnavailable):
            self.is_lost = True
            return
        if self.is_lost:
            self.is_lost = False
            self._has_gap = True
            self.moved_ns = now_ns
            self._counter_mj = counter_mj
            return
        if counter_mj == self._counter_mj:
            return
        delta_mj = counter_mj - self._counter_mj
        if 0 < delta_mj <= self._most_mj(now_ns - self.moved_ns):
            self.energy_mj += delta_mj
        else:
            self._has_gap = True
        self._counter_mj = counter_mj
        self.moved_ns = now_ns
        self.has_moved = True

    def take_gap(self) -> bool:
        """Begin the next group reading; says whether this one is incomplete."""
        has_gap, self._has_gap, self.has_moved = self._has_gap, False, False
        return has_gap

    def _open(self) -> None:
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(self._uuid)
        except self._nvml.NVMLError as error:
            raise MeterUnavailable(
                f"GPU {self._uuid} is not on this host ({error}); see `nvidia-smi -L`"
            ) from error
        unreadable = _unreadable(self._nvml, self._handle, self._uuid)
        if unreadable:
            raise MeterUnavailable(f"GPU {self._uuid}: {unreadable}")
        try:
            self._limit_mw = self._nvml.nvmlDeviceGetPowerManagementLimit(self._handle)
        except self._nvml.NVMLError:
            self._limit_mw = _FALLBACK_LIMIT_MW

    def _most_mj(self, time_ns: int) -> float:
        """An edge can hold one update period more than the time between two polls."""
        return _PLAUSIBLE * self._limit_mw * (time_ns + _PERIOD_NS) / _PJ_PER_MJ


def _init(nvml: NvmlLibrary) -> None:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise MeterUnavailable(
            f"NVML cannot be used here ({error}); is the NVIDIA driver installed?"
        ) from error


def _describe(nvml: NvmlLibrary, handle: object) -> GpuDescription:
    uuid = nvml.nvmlDeviceGetUUID(handle)
    unreadable = _unreadable(nvml, handle, uuid)
    if not unreadable:
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            unreadable = f"no energy counter ({error})"
    return GpuDescription(uuid=uuid, name=nvml.nvmlDeviceGetName(handle), unreadable=unreadable)


def _unreadable(nvml: NvmlLibrary, handle: object, uuid: str) -> str:
    """MIG slices have no meter of their own, and the counter of the whole GPU would bill the neighbours."""
    try:
        is_mig = uuid.startswith("MIG-") or nvml.nvmlDeviceGetMigMode(handle)[0] == 1
    except nvml.NVMLError:
        is_mig = False
    return "MIG is on, and a slice has no energy meter; turn MIG off or use meter cpu-model" if is_mig else ""
