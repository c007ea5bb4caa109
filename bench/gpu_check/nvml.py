"""The driver's management library through ctypes: energy counter, power, name. No Python package is needed.

Only what the check asks: `replicas/energy/nvml.py` is the meter that serves, and is checked against this one.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_LIBRARY = "libnvidia-ml.so.1"
_POWER_INSTANT = 186


class NvmlUnavailable(Exception):
    """No driver library, no such GPU, or no such counter; the text says which."""


class _FieldValue(ctypes.Structure):
    """nvmlFieldValue_t: one answer of nvmlDeviceGetFieldValues."""

    _fields_ = (
        ("field", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("timestamp_us", ctypes.c_longlong),
        ("latency_us", ctypes.c_longlong),
        ("value_type", ctypes.c_int),
        ("status", ctypes.c_int),
        ("value", ctypes.c_ulonglong),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What the driver says of the GPU once. `power_limit_w` None: not told."""

    name: str
    uuid: str
    driver: str
    power_limit_w: float | None


class NvmlGpu:
    """One GPU, by UUID. Raises NvmlUnavailable where a call is refused."""

    def __init__(self, uuid: str) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise NvmlUnavailable(f"{_LIBRARY} does not load: {error}") from error
        self._call("nvmlInit_v2")
        self._handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._handle))
        self._uuid = uuid

    def facts(self) -> GpuFacts:
        name, driver = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
        self._call("nvmlDeviceGetName", self._handle, name, len(name))
        self._call("nvmlSystemGetDriverVersion", driver, len(driver))
        try:
            limit_w = self._unsigned("nvmlDeviceGetEnforcedPowerLimit") / 1e3
        except NvmlUnavailable:
            limit_w = None
        return GpuFacts(
            name=name.value.decode(), uuid=self._uuid, driver=driver.value.decode(), power_limit_w=limit_w
        )

    def energy_mj(self) -> int:
        """Millijoules since the driver was loaded."""
        value = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(value))
        return value.value

    def average_power_w(self) -> float:
        """The default power reading: an average over about a second on Hopper."""
        return self._unsigned("nvmlDeviceGetPowerUsage") / 1e3

    def instant_power_w(self) -> float:
        value = _FieldValue(field=_POWER_INSTANT)
        self._call("nvmlDeviceGetFieldValues", self._handle, 1, ctypes.byref(value))
        if value.status:
            raise NvmlUnavailable(f"POWER_INSTANT is refused with status {value.status}")
        return float(value.value & 0xFFFF_FFFF) / 1e3

    def close(self) -> None:
        self._library.nvmlShutdown()

    def _unsigned(self, function: str) -> int:
        value = ctypes.c_uint()
        self._call(function, self._handle, ctypes.byref(value))
        return value.value

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise NvmlUnavailable(f"{function} is refused with status {status}")
