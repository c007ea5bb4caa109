"""One GPU's energy through NVML: its counter made monotone, and its power where the counter fails.

Owned by `NvmlMeter` (`nvml.py`), which polls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from replicas.energy.meter import MeterScope, MeterState
from replicas.errors import MeterUnavailable

_PLAUSIBLE = 1.3
_PERIOD_NS = 100_000_000
_FALLBACK_LIMIT_MW = 1_500_000
_STALL_NS = 2_000_000_000
_RETRY_NS = 1_000_000_000
_RESET_SHOWN_NS = 60_000_000_000
_PJ_PER_MJ = 1_000_000_000
_POWER_INSTANT = 186
"""NVML_FI_DEV_POWER_INSTANT. The plain power call averages over a second on new GPUs, and is for old ones."""
_SCOPE_NUMBERS = {MeterScope.DEVICE: 0, MeterScope.MODULE: 1}
"""NVML_POWER_SCOPE_GPU and NVML_POWER_SCOPE_MODULE."""
_SUCCESS = 0
_KEEP_CHECK = 0.98
_LEAST_CHECK_MJ = 1_000


class FieldNumber(Protocol):
    """The number of a field, in the type that power has."""

    uiVal: int


class FieldValue(Protocol):
    """One answer of `nvmlDeviceGetFieldValues`."""

    nvmlReturn: int

    @property
    def value(self) -> FieldNumber: ...


class C2cMode(Protocol):
    """Whether a GPU is linked chip to chip with a CPU, as on Grace Hopper."""

    isC2cEnabled: int


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
    def nvmlDeviceGetC2cModeInfoV(self, handle: object, /) -> C2cMode: ...  # noqa: N802
    def nvmlDeviceGetFieldValues(  # noqa: N802
        self, handle: object, fields: list[tuple[int, int]], /
    ) -> Sequence[FieldValue]: ...
    def nvmlDeviceGetPowerUsage(self, handle: object, /) -> int: ...  # noqa: N802


class NvmlGpu:
    """A counter that never falls, read by `poll`; its fields are for the meter, after each poll.

    A counter that falls or jumps by more than 1.3 x the power limit allows starts a new epoch: what it lost
    is not guessed, there is a gap. A GPU that cannot be read is looked for once a second. While the counter
    stands still for 2 s, or the GPU has none, power is integrated instead; what was counted that way is taken
    off the counter's next edge, so in the end the counter is right. Without power to read, a counter that
    stands still counts nothing, and its energy comes with the next edge.

    `check_ratio` compares counter and integrated power over some seconds of edges; None until a joule.
    """

    def __init__(self, nvml: NvmlLibrary, uuid: str, now_ns: int) -> None:
        self._nvml = nvml
        self._uuid = uuid
        self._retry_ns = 0
        self.moved_ns = now_ns
        self.energy_mj = 0
        self.has_moved = False
        self.is_counted = True
        self.is_lost = False
        self._is_stale = False
        self._has_gap = False
        self._reset_until_ns = 0
        self._polled_ns = now_ns
        self._power_ns = now_ns
        self._ahead_ns = now_ns
        self._integral_pj = 0
        self._ahead_mj = 0
        self._check_mj = [0.0, 0.0]
        self._open()
        self._power_mw = self._read_power_mw()
        self._counter_mj = self._first_count_mj()

    @property
    def state(self) -> MeterState:
        if self.is_lost:
            return MeterState.LOST
        if self._is_stale and self._counter_mj is not None:
            return MeterState.STALE
        return MeterState.RESET if self._polled_ns < self._reset_until_ns else MeterState.OK

    @property
    def is_counting(self) -> bool:
        """False while neither counter nor power says anything."""
        return not self.is_lost and (not self._is_stale or self._power_mw is not None)

    @property
    def check_ratio(self) -> float | None:
        counted_mj, integrated_mj = self._check_mj
        return counted_mj / integrated_mj if integrated_mj >= _LEAST_CHECK_MJ else None

    def poll(self, now_ns: int) -> None:
        """Look at the counter; `now_ns` is taken as the time of an edge found by it."""
        self._polled_ns = now_ns
        try:
            if self.is_lost:
                if now_ns < self._retry_ns:
                    return
                self._retry_ns = now_ns + _RETRY_NS
                self._nvml.nvmlInit()
                self._open()
            counter_mj = None if self._counter_mj is None else self._count_mj()
        except (self._nvml.NVMLError, MeterUnavailable):
            self.is_lost = True
            return
        if self.is_lost:
            self._come_back(counter_mj, now_ns)
            return
        is_edge = counter_mj != self._counter_mj
        self._integrate(now_ns, is_due=is_edge or now_ns - self._power_ns >= _PERIOD_NS)
        if is_edge and counter_mj is not None and self._counter_mj is not None:
            self._take_edge(counter_mj, counter_mj - self._counter_mj, now_ns)
        self._is_stale = self._counter_mj is None or now_ns - self.moved_ns > _STALL_NS
        if self._is_stale and self._power_mw is not None:
            self._count_by_power(now_ns)

    def take_gap(self) -> bool:
        """Begin the next group reading; says whether this one is incomplete."""
        has_gap, self._has_gap, self.has_moved, self.is_counted = self._has_gap, False, False, True
        return has_gap

    def _take_edge(self, counter_mj: int, delta_mj: int, now_ns: int) -> None:
        if 0 < delta_mj <= self._most_mj(now_ns - self.moved_ns):
            self._note_check(delta_mj)
            self.energy_mj += max(0, delta_mj - self._ahead_mj)
            self._ahead_mj = max(0, self._ahead_mj - delta_mj)
        else:
            self._has_gap = True
            self._ahead_mj = 0
            self._reset_until_ns = now_ns + _RESET_SHOWN_NS
        self._counter_mj = counter_mj
        self._restart_integral(now_ns)
        self.has_moved = True

    def _come_back(self, counter_mj: int | None, now_ns: int) -> None:
        self.is_lost = False
        self._has_gap = True
        self._counter_mj = counter_mj
        self._ahead_mj = 0
        self._restart_integral(now_ns)

    def _restart_integral(self, now_ns: int) -> None:
        self.moved_ns = self._power_ns = self._ahead_ns = now_ns
        self._integral_pj = 0

    def _integrate(self, now_ns: int, *, is_due: bool) -> None:
        """Sample power at each edge, and as often without them; between samples it is the mean of the two."""
        if not is_due:
            return
        power_mw = self._read_power_mw()
        if power_mw is not None and self._power_mw is not None:
            self._integral_pj += (self._power_mw + power_mw) * (now_ns - self._power_ns) // 2
        self._power_mw, self._power_ns = power_mw, now_ns

    def _count_by_power(self, now_ns: int) -> None:
        """Move on by what was integrated since the last time, ahead of the counter."""
        if now_ns - self._ahead_ns < _PERIOD_NS:
            return
        new_mj = self._integral_pj // _PJ_PER_MJ
        self._integral_pj -= new_mj * _PJ_PER_MJ
        self.energy_mj += new_mj
        self._ahead_mj += new_mj if self._counter_mj is not None else 0
        self._ahead_ns = now_ns
        self.has_moved, self.is_counted = True, False

    def _note_check(self, delta_mj: int) -> None:
        """Only edges whose whole time power was sampled in, and none of it counted ahead."""
        if self._power_mw is None or self._ahead_mj or not self._integral_pj:
            return
        for i, new_mj in enumerate((delta_mj, self._integral_pj / _PJ_PER_MJ)):
            self._check_mj[i] = _KEEP_CHECK * self._check_mj[i] + new_mj

    def _first_count_mj(self) -> int | None:
        """None where there is no counter but power to integrate. MeterUnavailable where there is neither."""
        try:
            return self._count_mj()
        except self._nvml.NVMLError as error:
            if self._power_mw is not None:
                return None
            raise MeterUnavailable(
                f"GPU {self._uuid} has no energy counter ({error}); Volta or newer is needed"
            ) from error

    def _count_mj(self) -> int:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def _read_power_mw(self) -> int | None:
        """None where power cannot be read, or is not what such a GPU can draw."""
        nvml = self._nvml
        try:
            fields = [(_POWER_INSTANT, _SCOPE_NUMBERS[self.scope])]
            (field,) = nvml.nvmlDeviceGetFieldValues(self._handle, fields)
            is_instant = field.nvmlReturn == _SUCCESS
            power_mw = field.value.uiVal if is_instant else nvml.nvmlDeviceGetPowerUsage(self._handle)
        except nvml.NVMLError:
            return None
        return power_mw if 0 <= power_mw <= _PLAUSIBLE * self._limit_mw else None

    def _open(self) -> None:
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(self._uuid)
        except self._nvml.NVMLError as error:
            raise MeterUnavailable(
                f"GPU {self._uuid} is not on this host ({error}); see `nvidia-smi -L`"
            ) from error
        unreadable = why_unreadable(self._nvml, self._handle, self._uuid)
        if unreadable:
            raise MeterUnavailable(f"GPU {self._uuid}: {unreadable}")
        self.scope = scope_of(self._nvml, self._handle)
        try:
            self._limit_mw = self._nvml.nvmlDeviceGetPowerManagementLimit(self._handle)
        except self._nvml.NVMLError:
            self._limit_mw = _FALLBACK_LIMIT_MW

    def _most_mj(self, time_ns: int) -> float:
        """An edge can hold one update period more than the time between two polls."""
        return _PLAUSIBLE * self._limit_mw * (time_ns + _PERIOD_NS) / _PJ_PER_MJ


def scope_of(nvml: NvmlLibrary, handle: object) -> MeterScope:
    """The counter of a Grace Hopper counts the whole module, CPU and memory included."""
    try:
        is_module = bool(nvml.nvmlDeviceGetC2cModeInfoV(handle).isC2cEnabled)
    except nvml.NVMLError:
        is_module = False
    return MeterScope.MODULE if is_module else MeterScope.DEVICE


def why_unreadable(nvml: NvmlLibrary, handle: object, uuid: str) -> str:
    """MIG slices have no meter of their own, and the counter of the whole GPU would bill the neighbours."""
    try:
        is_mig = uuid.startswith("MIG-") or nvml.nvmlDeviceGetMigMode(handle)[0] == 1
    except nvml.NVMLError:
        is_mig = False
    return "MIG is on, and a slice has no energy meter; turn MIG off or use meter cpu-model" if is_mig else ""
