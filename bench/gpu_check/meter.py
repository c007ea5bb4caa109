"""Section `meter`: the driver's energy counter: how often it moves, what a call costs, whether it is right.

Answers what could not be known without a GPU: spacing of the counter's edges, cost of a call, idle watts, and
the counter's joules over the integral of the power readings for the same seconds of load.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from bench.gpu_check.case import draw
from bench.gpu_check.energy_trace import EnergyTrace, widest_window
from bench.gpu_check.nvml import NvmlGpu, NvmlUnavailable
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting
from replicas.energy.meter import Reading

_RATIO = (0.8, 1.25)
"""Counter over integral outside of this means that one of the two is not what we take it for."""


def run(setting: Setting, report: SectionReport) -> None:
    if not setting.is_cuda:
        report.skip("the energy counter: it belongs to an NVIDIA GPU")
        return
    meter = setting.open_meter()
    facts = meter.facts()
    report.row(name=facts.name, driver=facts.driver, power_limit_w=facts.power_limit_w or "not told")
    seconds = 1.5 if setting.is_quick else 3.0
    report.attempt("cost of a call", partial(_call_cost, meter, report))
    report.attempt("idle", partial(_idle, meter, seconds, report))
    report.attempt("load", partial(_load, meter, setting, seconds, report))
    report.attempt("the meter that serves", partial(_product_meter, facts.uuid, setting, report))
    meter.close()


def _call_cost(meter: NvmlGpu, report: SectionReport) -> None:
    calls: dict[str, Callable[[], object]] = {
        "energy counter": meter.energy_mj,
        "average power": meter.average_power_w,
        "instant power": meter.instant_power_w,
    }
    for name, call in calls.items():
        try:
            call()
        except NvmlUnavailable as error:
            report.check(name != "energy counter", call=name, refused=str(error))
            continue
        times_us = []
        for _ in range(200):
            began_s = time.perf_counter()
            call()
            times_us.append((time.perf_counter() - began_s) * 1e6)
        times_us.sort()
        report.row(call=name, microseconds_p50=times_us[100], microseconds_p99=times_us[198])


def _idle(meter: NvmlGpu, seconds: float, report: SectionReport) -> None:
    time.sleep(1.0)
    with EnergyTrace(meter.energy_mj, period_s=0.001) as trace:
        began_s = time.perf_counter()
        time.sleep(seconds)
    window = widest_window(trace.edges, began_s, time.perf_counter())
    if window is None:
        report.check(False, state="idle", edges=len(trace.edges), fault="the counter does not move")
        return
    report.row(state="idle", watts=window.power_w, power_usage_w=meter.average_power_w(), **_spacing(trace))


def _load(meter: NvmlGpu, setting: Setting, seconds: float, report: SectionReport) -> None:
    """A stream of large products; power is sampled beside it."""
    size = 8192
    left, right = (draw((size, size), setting.dtype, setting.device, seed=seed) for seed in (1, 2))
    out = torch.empty_like(left)
    samples: list[tuple[float, float]] = []
    with EnergyTrace(meter.energy_mj, period_s=0.001) as trace:
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < seconds:
            for _ in range(10):
                torch.mm(left, right, out=out)
            setting.synchronize()
            samples.append((time.perf_counter(), _power_w(meter)))
    window = widest_window(trace.edges, began_s + 0.5, time.perf_counter())
    if window is None:
        report.check(False, state="load", edges=len(trace.edges), fault="the counter does not move")
        return
    power_w = [watts for at_s, watts in samples if window.start_s <= at_s <= window.end_s]
    integral_j = statistics.fmean(power_w) * (window.end_s - window.start_s)
    ratio = window.energy_j / integral_j
    report.check(
        _RATIO[0] <= ratio <= _RATIO[1],
        state="load",
        watts=window.power_w,
        counter_over_integral=ratio,
        power_samples=len(power_w),
        **_spacing(trace),
    )


def _power_w(meter: NvmlGpu) -> float:
    try:
        return meter.instant_power_w()
    except NvmlUnavailable:
        return meter.average_power_w()


def _spacing(trace: EnergyTrace) -> dict[str, float]:
    """Milliseconds between changes of the counter."""
    gaps_ms = sorted(
        (after[0] - before[0]) * 1e3 for before, after in zip(trace.edges, trace.edges[1:], strict=False)
    )
    if not gaps_ms:
        return {}
    return {
        "edge_ms_min": gaps_ms[0],
        "edge_ms_p50": gaps_ms[len(gaps_ms) // 2],
        "edge_ms_max": gaps_ms[-1],
    }


def _product_meter(uuid: str, setting: Setting, report: SectionReport) -> None:
    """The meter that serves, over two seconds of rest, must find the counter's edges too."""
    try:
        from replicas.energy.nvml import NvmlMeter
    except ImportError as error:
        report.skip(f"the meter that serves: {error}")
        return
    meter = NvmlMeter([uuid])
    times_us: list[float] = []
    readings: list[Reading] = []
    until_s = time.perf_counter() + (1.0 if setting.is_quick else 2.0)
    while time.perf_counter() < until_s:
        began_s = time.perf_counter()
        reading = meter.read()
        times_us.append((time.perf_counter() - began_s) * 1e6)
        if reading is not None and (not readings or readings[-1].t_ns != reading.t_ns):
            readings.append(reading)
        time.sleep(0.02)
    meter.close()
    is_moving = len(readings) > 2 and readings[-1].energy_mj > readings[0].energy_mj
    report.check(
        is_moving,
        meter="replicas.energy.nvml",
        readings=len(readings),
        gaps=sum(one.gap for one in readings),
        read_microseconds_p50=statistics.median(times_us),
    )
