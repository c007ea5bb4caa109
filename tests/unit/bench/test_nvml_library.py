"""The ctypes binding against a library with the driver's functions, compiled here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench.gpu_check import nvml
from bench.gpu_check.nvml import GpuFacts, NvmlGpu, NvmlUnavailable

SOURCE = r"""
#include <string.h>
typedef struct { unsigned field, scope; long long timestamp, latency; int type, status;
                 union { unsigned u; unsigned long long ull; } value; } Field;
static int device;
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  if (strcmp(uuid, "GPU-1")) return 6;
  *handle = &device; return 0; }
int nvmlDeviceGetName(void *handle, char *name, unsigned size) {
  if (handle != &device) return 2;
  strncpy(name, "Test H200", size); return 0; }
int nvmlSystemGetDriverVersion(char *name, unsigned size) { strncpy(name, "580.1", size); return 0; }
int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *mw) { *mw = 700000; return 0; }
int nvmlDeviceGetPowerUsage(void *handle, unsigned *mw) { *mw = 123456; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *mj) {
  *mj = 5000000000ull; return handle == &device ? 0 : 2; }
int nvmlDeviceGetFieldValues(void *handle, int count, Field *values) {
  values[0].status = values[0].field == 186 && count == 1 ? 0 : 3;
  values[0].value.u = 98765; return 0; }
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, target = tmp_path / "nvml.c", tmp_path / "libnvidia-ml.so.1"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    monkeypatch.setattr(nvml, "_LIBRARY", str(target))


@pytest.mark.usefixtures("library")
def test_units_are_watts_and_millijoules() -> None:
    gpu = NvmlGpu("GPU-1")
    assert gpu.facts() == GpuFacts(name="Test H200", uuid="GPU-1", driver="580.1", power_limit_w=700.0)
    assert gpu.energy_mj() == 5_000_000_000
    assert gpu.average_power_w() == 123.456
    assert gpu.instant_power_w() == 98.765
    gpu.close()


@pytest.mark.usefixtures("library")
def test_a_refusal_names_the_call_and_its_status() -> None:
    with pytest.raises(NvmlUnavailable, match="nvmlDeviceGetHandleByUUID is refused with status 6"):
        NvmlGpu("GPU-2")


def test_a_machine_without_the_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_LIBRARY", "libno-such-driver.so.1")
    with pytest.raises(NvmlUnavailable, match="does not load"):
        NvmlGpu("GPU-1")
