"""Where the time of a step goes: its kernels by PyTorch's profiler, and what is left between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu_check.report import SectionReport

_RUNS = 4
_MOST_KERNELS = 16
_NAME_CHARACTERS = 70


def report_kernels(run_once: Callable[[], object], report: SectionReport, **values: object) -> None:
    """A row per kernel of a run, the longest first, and one for all of them. CUDA only.

    `busy` is the part of the wall time in which a kernel ran; the profiler itself adds to the rest.
    """
    run_once()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    began.record()
    for _ in range(_RUNS):
        run_once()
    ended.record()
    torch.cuda.synchronize()
    plain_us = 1e3 * began.elapsed_time(ended) / _RUNS
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(_RUNS):
            run_once()
        torch.cuda.synchronize()
    # A graph's launch on the host is charged with its kernels too: only what is of the device counts.
    kernels = sorted(
        (
            (one.self_device_time_total / _RUNS, one.count / _RUNS, one.key)
            for one in seen.key_averages()
            if one.device_type.name == "CUDA" and one.self_device_time_total > 0
        ),
        reverse=True,
    )
    if not kernels:
        report.skip(f"kernels of {values}: the profiler saw none")
        return
    total_us = sum(one[0] for one in kernels)
    report.row(
        **values,
        kernels=sum(one[1] for one in kernels),
        kernel_us=total_us,
        step_us=plain_us,
        busy=total_us / plain_us,
    )
    for device_us, count, name in kernels[:_MOST_KERNELS]:
        report.row(
            **values,
            kernel=name[:_NAME_CHARACTERS],
            launches=count,
            us_each=device_us / max(count, 1.0),
            share=device_us / total_us,
        )
