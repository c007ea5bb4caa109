"""A GPU that CUDA_VISIBLE_DEVICES hides is named and metered all the same: real processes, a compiled driver.

Ray sets that variable to nothing for actors without a GPU: the supervisor, and the energy agent it makes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from grpc import aio

from protos import wattline_energy_pb2 as wire
from protos.wattline_energy_pb2_grpc import EnergyAgentStub
from replicas.energy.meter import Source
from replicas.supervisor.meter_feed import AgentFeed
from replicas.supervisor.rank_group import RankProcess

pytestmark = pytest.mark.processes

WAIT_S = 100.0
UUID = "GPU-5ce7a0aa"
DRIVER = r"""
#include <string.h>
#include <time.h>
static int device;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  *handle = &device; return index ? 2 : 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  *handle = &device; return strcmp(uuid, "GPU-5ce7a0aa") ? 6 : 0; }
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size) {
  strncpy(uuid, "GPU-5ce7a0aa", size); return 0; }
int nvmlDeviceGetName(void *handle, char *name, unsigned size) {
  strncpy(name, "Test H200", size); return 0; }
int nvmlDeviceGetPowerManagementLimit(void *handle, unsigned *mw) { *mw = 700000; return 0; }
int nvmlDeviceGetPowerUsage(void *handle, unsigned *mw) { *mw = 200000; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *mj) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *mj = (now.tv_sec * 10ull + now.tv_nsec / 100000000) * 20000; return 0; }
"""
"""200 W, counted every 100 ms. What is missing is refused, as old drivers do."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = tmp_path / "nvml.c"
    source.write_text(DRIVER)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def agent_address(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    address = f"unix:{tmp_path}/energy.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "replicas.energy.agent", "--listen", address],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"energy agent listens on {address}\n"
    yield address
    process.kill()
    process.wait()
    process.stdout.close()


async def test_a_supervisor_gets_the_joules_of_a_gpu_that_is_hidden_from_it(agent_address: str) -> None:
    rank = RankProcess(rank=0, pid=os.getpid(), device=UUID)
    feed = AgentFeed(address=agent_address, group="llama-0", ranks=[rank], meter="auto")
    async with asyncio.timeout(WAIT_S), aclosing(feed.readings()) as readings:
        first, second = await anext(readings), await anext(readings)
    assert {first.source, second.source} == {Source.COUNTER}
    assert (second.energy_mj - first.energy_mj) % 20_000 == 0
    assert second.energy_mj > first.energy_mj


async def test_the_survey_lists_it(agent_address: str) -> None:
    async with aio.insecure_channel(agent_address) as channel:
        response = await EnergyAgentStub(channel).DescribeMeters(wire.DescribeMetersRequest())
    (gpu,) = [meter for meter in response.meters if meter.name == "nvml"]
    assert (gpu.device, gpu.detail, gpu.available) == (UUID, "Test H200", True)


def test_a_rank_knows_its_name(environment: dict[str, str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "from cluster.serving.gpu_names import gpu_uuid; print(gpu_uuid('0'))"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"{UUID}\n"
