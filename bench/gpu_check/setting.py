"""Where and how large the check runs, and how time is taken on its device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.gpu_check.nvml import NvmlGpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`is_tiny`: shapes of seconds on a CPU; `is_quick`: fewer batches and shorter windows. `shape`: the one
    served shape to look at; empty: all."""

    device: torch.device
    is_tiny: bool
    is_quick: bool
    shape: str = ""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def window_s(self) -> float:
        """How long a load runs for an energy figure: at least ten edges of the counter, five when quick."""
        return 1e-6 if self.is_tiny else 0.6 if self.is_quick else 1.2

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        """Device memory that could be allocated now; a CPU is taken to have 2 GiB for this."""
        if not self.is_cuda:
            return 2 * 2**30
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return free

    def open_meter(self) -> NvmlGpu:
        """The GPU the check runs on, whatever CUDA_VISIBLE_DEVICES says."""
        properties = torch.cuda.get_device_properties(self.device)
        return NvmlGpu(f"GPU-{properties.uuid}")

    def time_s(self, run: Callable[[], object], *, budget_s: float = 0.2) -> float:
        """Median seconds of one run, from a graph of many on CUDA: Python's own time is left out.

        What fits the L2 cache stays there between the runs.
        """
        for _ in range(2):
            run()
        self.synchronize()
        if not self.is_cuda:
            began_s = time.perf_counter()
            run()
            return time.perf_counter() - began_s
        once_s = _cuda_seconds(run)
        count = max(1, min(50, int(budget_s / 8 / max(1e-6, once_s))))
        replay = capture(lambda: [run() for _ in range(count)])
        return statistics.median(_cuda_seconds(replay) for _ in range(5)) / count

    def host_time_s(self, run: Callable[[], object], *, repeats: int = 3) -> float:
        """Median wall seconds of one run, the device idle around it: for what no graph can hold."""
        run()
        times_s = []
        for _ in range(repeats):
            self.synchronize()
            began_s = time.perf_counter()
            run()
            self.synchronize()
            times_s.append(time.perf_counter() - began_s)
        return statistics.median(times_s)


def capture(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a CUDA graph, after a warm run on the capture's own stream."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def _cuda_seconds(run: Callable[[], object]) -> float:
    began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3
