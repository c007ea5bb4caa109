"""Section `speed-*`: decode and prefill of an exact served shape, against the roofline, and their joules.

Random weights, made on the device. A decode step is a captured graph that feeds itself, at a mean context of
1024 tokens; prefill is one chunk of 2048 tokens, launched as the engine launches it and as a graph. Whatever
the counter gives is split into what the idle GPU would have drawn (static) and the rest (dynamic). Where the
time goes, kernel by kernel, is asked last: the profiler may refuse.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.gpu_check.bare_model import DecodeLoop, chunk_batch
from bench.gpu_check.energy_trace import Counter, EnergyTrace, widest_window
from bench.gpu_check.kernel_profile import report_kernels
from bench.gpu_check.nvml import NvmlUnavailable
from bench.gpu_check.rates import Rates, measure_rates
from bench.gpu_check.report import SectionReport
from bench.gpu_check.roofline import decode_floor_s, prefill_floor_s
from bench.gpu_check.served_model import ServedModel, make_served_model, shapes_of
from bench.gpu_check.setting import Setting, capture
from bench.gpu_check.shapes import Shape
from bench.gpu_check.steady_load import LoadResult, run_load

_TELEMETRY_BATCH = 64
_PROFILED_BATCHES = (1, 64, 256)
_AGENT_POLL_S = 0.02
"""How often the serving energy agent reads the counter."""
_SYNC_STEPS = 16
_PREFILL_RUNS = 4
_SLACK_S = 1.5
"""What a measurement takes beside its window: capture, and the rounds that overrun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """What the rows are compared with. `counter` and `idle_w` None: no meter."""

    rates: Rates
    counter: Counter | None
    idle_w: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """One shape under measurement."""

    served: ServedModel
    yardstick: Yardstick
    setting: Setting
    report: SectionReport

    def attempt(self, what: str, run: Callable[[], object], *, rounds: int = 1) -> None:
        """If there is time for its windows."""
        setting, report = self.setting, self.report
        if not report.has_time(rounds * (setting.window_s + _SLACK_S) if setting.is_cuda else 0.0):
            report.skip(f"{self.served.name}, {what}: out of time")
            return
        report.attempt(f"{self.served.name}, {what}", run)


def run(setting: Setting, report: SectionReport) -> None:
    yardstick = _yardstick(setting, report)
    for shape in shapes_of(setting):
        _measure_shape(shape, yardstick, setting, report)


def _yardstick(setting: Setting, report: SectionReport) -> Yardstick:
    rates = measure_rates(setting)
    report.row(bandwidth_gb_per_s=rates.best_b_s / 1e9, matmul_tflop_per_s=rates.matmul_flop_s / 1e12)
    if not setting.is_cuda:
        report.skip("joules: no GPU, no counter")
        return Yardstick(rates=rates, counter=None, idle_w=None)
    try:
        meter = setting.open_meter()
        meter.energy_mj()
    except NvmlUnavailable as error:
        report.skip(f"joules: {error}")
        return Yardstick(rates=rates, counter=None, idle_w=None)
    time.sleep(1.0)
    with EnergyTrace(meter.energy_mj) as trace:
        time.sleep(1.0)
    window = widest_window(trace.edges, 0.0, time.perf_counter())
    idle_w = window.power_w if window else None
    report.row(idle_watts=idle_w if idle_w is not None else "not known")
    return Yardstick(rates=rates, counter=meter.energy_mj, idle_w=idle_w)


@torch.inference_mode()
def _measure_shape(shape: Shape, yardstick: Yardstick, setting: Setting, report: SectionReport) -> None:
    served = make_served_model(shape, setting, report)
    bench = _Bench(served=served, yardstick=yardstick, setting=setting, report=report)
    bench.attempt("decode at batch 1", partial(_measure_decode, bench, 1 if 1 in served.batches else 2))
    bench.attempt("prefill", partial(_measure_prefill, bench), rounds=2)
    # The ends of the range say most.
    for batch in sorted(set(served.batches[1:]), key=lambda one: (one not in _PROFILED_BATCHES, one)):
        bench.attempt(f"decode at batch {batch}", partial(_measure_decode, bench, batch))
    if not setting.is_cuda:
        return
    if 1 in served.batches:
        bench.attempt("batch 1, not fused", partial(_measure_decode, bench, 1, is_fused=False))
    for batch in (one for one in _PROFILED_BATCHES if one in served.batches):
        bench.attempt(f"kernels at batch {batch}", partial(_profile_decode, bench, batch))
    bench.attempt("kernels of a prefill", partial(_profile_prefill, bench))
    if yardstick.counter is not None and _TELEMETRY_BATCH in served.batches:
        bench.attempt("telemetry", partial(_measure_telemetry, bench, yardstick.counter), rounds=4)


def _measure_decode(bench: _Bench, batch: int, *, is_fused: bool = True) -> None:
    setting, served = bench.setting, bench.served
    loop, load = _decode_load(bench, batch, is_fused=is_fused)
    result = load(counter=bench.yardstick.counter)
    floor_s = decode_floor_s(
        served.model.spec,
        bench.yardstick.rates,
        batch=batch,
        context=served.context + served.steps / 2,
        experts_hit=loop.experts_hit(),
        itemsize=setting.dtype.itemsize,
    )
    bench.report.row(
        model=served.name,
        phase="decode",
        path=("graph" if setting.is_cuda else "launched") + ("" if is_fused else ", not fused"),
        batch=batch,
        tok_per_s=result.tokens_per_s,
        ms_per_step=1e3 * batch / result.tokens_per_s,
        roofline=floor_s * result.tokens_per_s / batch,
        **result.energy_row(bench.yardstick.idle_w),
    )


def _decode_load(
    bench: _Bench, batch: int, *, is_fused: bool = True
) -> tuple[DecodeLoop, Callable[..., LoadResult]]:
    """Decoding for a window's seconds, in rounds of as many steps as the loop has room for; never far ahead
    of the device."""
    setting, steps = bench.setting, bench.served.steps
    loop = bench.served.loop(batch, is_fused=is_fused)
    step = loop.captured() if setting.is_cuda else loop.step

    def run_round() -> float:
        loop.reset()
        for index in range(steps):
            step()
            if index % _SYNC_STEPS == 0:
                setting.synchronize()
        return float(batch * steps)

    return loop, partial(run_load, run_round, setting.synchronize, seconds=setting.window_s)


def _measure_telemetry(bench: _Bench, counter: Counter) -> None:
    """Throughput without the meter and with it, alternating, so that a drift of the clocks hits both."""
    _, load = _decode_load(bench, _TELEMETRY_BATCH)
    without, with_meter = [], []
    for _ in range(2):
        without.append(load().tokens_per_s)
        with_meter.append(load(counter=counter, poll_s=_AGENT_POLL_S).tokens_per_s)
    bench.report.row(
        model=bench.served.name,
        phase="telemetry",
        tok_per_s_without=max(without),
        cost_percent=100 * (1.0 - sum(with_meter) / sum(without)),
        spread_percent=100 * (max(without) / min(without) - 1.0),
    )


def _prefill(bench: _Bench) -> Callable[[], None]:
    model, chunk = bench.served.model, bench.served.chunk
    ids = torch.randint(0, model.spec.vocab_size, (chunk,), device=bench.setting.device)
    batch = chunk_batch(model, ids, first_block=1)

    def launched() -> None:
        model.decoder.logits(batch)

    return launched


def _measure_prefill(bench: _Bench) -> None:
    setting, served, yardstick = bench.setting, bench.served, bench.yardstick
    floor_s = prefill_floor_s(
        served.model.spec, yardstick.rates, num_tokens=served.chunk, itemsize=setting.dtype.itemsize
    )
    launched = _prefill(bench)
    paths: dict[str, Callable[[], None]] = {"launched": launched}
    if setting.is_cuda:
        launched()
        paths["graph"] = capture(launched)
    for path, run_once in paths.items():
        result = run_load(
            partial(_prefill_round, run_once, served.chunk),
            setting.synchronize,
            seconds=setting.window_s,
            counter=yardstick.counter,
        )
        bench.report.row(
            model=served.name,
            phase="prefill",
            path=path,
            tokens=served.chunk,
            tok_per_s=result.tokens_per_s,
            roofline=floor_s * result.tokens_per_s / served.chunk,
            **result.energy_row(yardstick.idle_w),
        )


def _prefill_round(run_once: Callable[[], None], num_tokens: int) -> float:
    for _ in range(_PREFILL_RUNS):
        run_once()
    return float(_PREFILL_RUNS * num_tokens)


def _profile_decode(bench: _Bench, batch: int) -> None:
    loop = bench.served.loop(batch)
    report_kernels(loop.captured(), bench.report, model=bench.served.name, phase="decode", batch=batch)


def _profile_prefill(bench: _Bench) -> None:
    report_kernels(
        _prefill(bench), bench.report, model=bench.served.name, phase="prefill", tokens=bench.served.chunk
    )
