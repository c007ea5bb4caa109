"""The energy counter of NVIDIA GPUs, through nvidia-ml-py. The only file that imports it.

GPUs are named by UUID, so what CUDA_VISIBLE_DEVICES hides is still found. The driver moves the counter about
every 100 ms; only those edges are readings, because between them the counter says nothing new. When they come
is learned (`edge_lock.py`). Used by the
energy agent alone: one process per host, made after any fork.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pynvml

from replicas.energy.edge_lock import EdgeLock
from replicas.energy.meter import MeterHealth, MeterScope, MeterState, Reading, Source
from replicas.energy.nvml_gpu import NvmlGpu, NvmlLibrary, scope_of, why_unreadable
from replicas.errors import MeterUnavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDescription:
    """A GPU of this host; `unreadable` says why its energy cannot be told, empty if it can."""

    uuid: str
    name: str
    unreadable: str = ""
    has_counter: bool = True
    """False: its power is integrated."""
    scope: MeterScope = MeterScope.DEVICE


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
    count, so no window begins between edges. Its time is known to half a poll of `poll_ns`, or better. What
    each GPU does when its counter falls, jumps, stands still or goes away: `nvml_gpu.py`. While one is lost
    `read()` is None, and there is a gap when it is back. A reading with integrated power of any GPU in it
    says so by its source.
    """

    def __init__(
        self,
        uuids: Sequence[str],
        nvml: NvmlLibrary = pynvml,
        *,
        poll_ns: int = 50_000_000,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if not uuids:
            raise MeterUnavailable("NVML meter: no GPU named; give at least one GPU UUID")
        _init(nvml)
        self._nvml = nvml
        self._clock = clock
        self._last: Reading | None = None
        self._polled_ns = clock()
        self.edges = EdgeLock(poll_ns=poll_ns, now_ns=self._polled_ns)
        try:
            self._gpus = [NvmlGpu(nvml, uuid, self._polled_ns) for uuid in dict.fromkeys(uuids)]
        except MeterUnavailable:
            nvml.nvmlShutdown()
            raise

    @property
    def scope(self) -> MeterScope:
        """A module's, if any of the GPUs is counted with its CPU and memory."""
        is_module = any(gpu.scope is MeterScope.MODULE for gpu in self._gpus)
        return MeterScope.MODULE if is_module else MeterScope.DEVICE

    def read(self) -> Reading | None:
        now_ns = self._clock()
        if now_ns <= self._polled_ns:
            return self._last
        edge_ns = self.edges.edge_ns(now_ns)
        self._polled_ns = now_ns
        for gpu in self._gpus:
            gpu.poll(edge_ns)
        is_counting = all(gpu.is_counting for gpu in self._gpus)
        has_moved = is_counting and all(gpu.has_moved for gpu in self._gpus)
        self.edges.note(now_ns, has_moved=has_moved)
        if not is_counting:
            return None
        if has_moved:
            is_counted = all(gpu.is_counted for gpu in self._gpus)
            gaps = [gpu.take_gap() for gpu in self._gpus]
            self._last = Reading(
                t_ns=edge_ns,
                energy_mj=sum(gpu.energy_mj for gpu in self._gpus),
                source=Source.COUNTER if is_counted else Source.POWER_INTEGRATED,
                gap=any(gaps),
            )
        return self._last

    def health(self) -> MeterHealth:
        """The worst state of the GPUs, and the ratio furthest from 1."""
        ratios = [gpu.check_ratio for gpu in self._gpus if gpu.check_ratio is not None]
        return MeterHealth(
            state=max((gpu.state for gpu in self._gpus), key=tuple(MeterState).index),
            check_ratio=max(ratios, key=lambda ratio: abs(ratio - 1.0)) if ratios else None,
        )

    def close(self) -> None:
        self._nvml.nvmlShutdown()


def _init(nvml: NvmlLibrary) -> None:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise MeterUnavailable(
            f"NVML cannot be used here ({error}); is the NVIDIA driver installed?"
        ) from error


def _describe(nvml: NvmlLibrary, handle: object) -> GpuDescription:
    uuid = nvml.nvmlDeviceGetUUID(handle)
    unreadable = why_unreadable(nvml, handle, uuid)
    has_counter = False
    if not unreadable:
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            has_counter = True
        except nvml.NVMLError as error:
            unreadable = _why_no_power(nvml, handle, f"no energy counter ({error})")
    return GpuDescription(
        uuid=uuid,
        name=nvml.nvmlDeviceGetName(handle),
        unreadable=unreadable,
        has_counter=has_counter,
        scope=scope_of(nvml, handle),
    )


def _why_no_power(nvml: NvmlLibrary, handle: object, so_far: str) -> str:
    """Empty if power can be integrated instead."""
    try:
        nvml.nvmlDeviceGetPowerUsage(handle)
    except nvml.NVMLError as error:
        return f"{so_far}, and no power reading ({error})"
    return ""
