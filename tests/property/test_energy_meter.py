"""P10: whatever a driver's counter does, readings never fall and never exceed what the power limit allows."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.energy.meter import Reading
from replicas.energy.nvml import NvmlMeter
from replicas.energy.nvml_gpu import C2cMode, FieldValue

LIMIT_W = 700
PERIOD_NS = 100_000_000


class DriverError(Exception):
    """Stands for pynvml.NVMLError."""


class ScriptedNvml:
    """One GPU whose counter is whatever the script says; None: the call fails."""

    NVMLError: type[Exception] = DriverError

    def __init__(self) -> None:
        self.counter_mj: int | None = 0
        self.now_ns = 0

    def clock_ns(self) -> int:
        return self.now_ns

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> object:  # noqa: N802
        return uuid

    def nvmlDeviceGetUUID(self, handle: object, /) -> str:  # noqa: N802
        return "GPU-1"

    def nvmlDeviceGetName(self, handle: object, /) -> str:  # noqa: N802
        return "GPU"

    def nvmlDeviceGetMigMode(self, handle: object, /) -> Sequence[int]:  # noqa: N802
        raise DriverError("Not Supported")

    def nvmlDeviceGetPowerManagementLimit(self, handle: object, /) -> int:  # noqa: N802
        return LIMIT_W * 1000

    def nvmlDeviceGetC2cModeInfoV(self, handle: object, /) -> C2cMode:  # noqa: N802
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetFieldValues(  # noqa: N802
        self, handle: object, fields: list[tuple[int, int]], /
    ) -> Sequence[FieldValue]:
        raise DriverError("Not Supported")

    def nvmlDeviceGetPowerUsage(self, handle: object, /) -> int:  # noqa: N802
        raise DriverError("Not Supported")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object, /) -> int:  # noqa: N802
        if self.counter_mj is None:
            raise DriverError("GPU is lost")
        return self.counter_mj


POLLS = st.lists(
    st.tuples(
        st.integers(-5_000_000, 200_000_000),
        st.one_of(st.none(), st.integers(0, 2**63), st.integers(0, 500_000)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(POLLS)
def test_p10_readings_never_fall_nor_exceed_the_power_limit(polls: list[tuple[int, int | None]]) -> None:
    nvml = ScriptedNvml()
    meter = NvmlMeter(["GPU-1"], nvml, clock=nvml.clock_ns)
    last: Reading | None = None
    for wait_ns, counter_mj in polls:
        nvml.now_ns += wait_ns
        nvml.counter_mj = counter_mj
        reading = meter.read()
        if reading is None or reading == last:
            continue
        if last is not None:
            assert reading.t_ns > last.t_ns
            assert reading.energy_mj >= last.energy_mj
            allowed_mj = 1.3 * LIMIT_W * (reading.t_ns - last.t_ns + PERIOD_NS) / 1e6
            assert reading.energy_mj - last.energy_mj <= allowed_mj
        last = reading
