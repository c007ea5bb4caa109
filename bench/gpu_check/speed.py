"""Section `speed`: decode and prefill of the exact served shapes, against the roofline, and their joules.

Random weights, made on the device. A decode step is a captured graph that feeds itself, at a mean context of
1024 tokens; prefill is one chunk of 2048 tokens, launched as the engine launches it and as a graph. Whatever
the counter gives is split into what the idle GPU would have drawn (static) and the rest (dynamic).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.gpu_check.bare_model import BareModel, DecodeLoop, chunk_batch, make_bare_model
from bench.gpu_check.energy_trace import Counter, EnergyTrace, widest_window
from bench.gpu_check.nvml import NvmlUnavailable
from bench.gpu_check.rates import Rates, measure_rates
from bench.gpu_check.report import SectionReport
from bench.gpu_check.roofline import costs, decode_floor_s, prefill_floor_s
from bench.gpu_check.setting import Setting, capture
from bench.gpu_check.shapes import Shape, random_weights, served_shapes, small_shapes, spec_of
from bench.gpu_check.steady_load import LoadResult, run_load
from replicas.config import ParallelConfig
from replicas.parallel.degrees import shard_of

_BATCHES = (1, 8, 32, 64, 128, 256)
_QUICK_BATCHES = (1, 64, 256)
_TELEMETRY_BATCH = 64
_AGENT_POLL_S = 0.02
"""How often the serving energy agent reads the counter."""
_SYNC_STEPS = 16
_PREFILL_RUNS = 4
_SPARE_BYTES = 4 * 2**30
_PAGE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """What the rows are compared with. `counter` and `idle_w` None: no meter."""

    rates: Rates
    counter: Counter | None
    idle_w: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    batches: tuple[int, ...]
    context: int
    steps: int
    chunk: int


def run(setting: Setting, report: SectionReport) -> None:
    yardstick = _yardstick(setting, report)
    for shape in small_shapes(is_tiny=True)[-1:] if setting.is_tiny else served_shapes():
        if not report.has_time(20.0 if setting.is_cuda else 0.0):
            report.skip(f"{shape.name}: out of time")
            continue
        _measure_shape(shape, yardstick, setting, report)


def _yardstick(setting: Setting, report: SectionReport) -> Yardstick:
    rates = measure_rates(setting)
    report.row(
        read_gb_per_s=rates.read_b_s / 1e9,
        copy_gb_per_s=rates.copy_b_s / 1e9,
        matmul_tflop_per_s=rates.matmul_flop_s / 1e12,
    )
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
    spec = spec_of(shape)
    sizes = _sizes(setting)
    shard = shard_of(spec, ParallelConfig(), 0)
    weights = random_weights(spec, shard, device=setting.device, dtype=setting.dtype)
    pages_each = -(-(sizes.context + sizes.steps) // _PAGE)
    block_bytes = costs(spec, setting.dtype.itemsize).kv_bytes_per_token * _PAGE
    most = (setting.free_bytes() - _SPARE_BYTES) // (block_bytes * pages_each)
    batches = [one for one in sizes.batches if setting.is_tiny or one <= most]
    if left := [one for one in sizes.batches if one not in batches]:
        report.skip(f"{shape.name} at batch {left}: the cache does not fit beside the weights")
    blocks = 1 + max(max(batches, default=1) * pages_each, -(-sizes.chunk // _PAGE))
    model = make_bare_model(spec, shard, weights, num_blocks=blocks, block_tokens=_PAGE)
    for cache in (*model.kv.keys, *model.kv.values):
        cache.normal_()  # A cache of zeros would draw less power than a real one.
    _measure_prefill(shape.name, model, sizes, yardstick, setting, report)
    for batch in batches:
        if not report.has_time(setting.window_s + 1.0 if setting.is_cuda else 0.0):
            report.skip(f"{shape.name} at batch {batch}: out of time")
            continue
        _measure_decode(shape.name, model, batch, sizes, yardstick, setting, report)


def _sizes(setting: Setting) -> _Sizes:
    if setting.is_tiny:
        return _Sizes(batches=(2,), context=20, steps=2, chunk=4)
    return _Sizes(
        batches=_QUICK_BATCHES if setting.is_quick else _BATCHES, context=960, steps=128, chunk=2048
    )


def _measure_decode(
    name: str,
    model: BareModel,
    batch: int,
    sizes: _Sizes,
    yardstick: Yardstick,
    setting: Setting,
    report: SectionReport,
) -> None:
    spec = model.spec
    ids = torch.randperm(spec.vocab_size, device=setting.device)[:batch]
    loop = DecodeLoop(model, ids, start_pos=sizes.context, max_tokens=sizes.steps)
    step = loop.captured() if setting.is_cuda else loop.step
    run_round = _rounds_of(loop, step, batch, sizes, setting)
    load = partial(run_load, run_round, setting.synchronize, seconds=setting.window_s)
    result = load(counter=yardstick.counter)
    floor_s = decode_floor_s(
        spec,
        yardstick.rates,
        batch=batch,
        context=sizes.context + sizes.steps / 2,
        experts_hit=loop.experts_hit(),
        itemsize=setting.dtype.itemsize,
    )
    report.row(
        model=name,
        phase="decode",
        path="graph" if setting.is_cuda else "launched",
        batch=batch,
        tok_per_s=result.tokens_per_s,
        ms_per_step=1e3 * batch / result.tokens_per_s,
        roofline=floor_s * result.tokens_per_s / batch,
        **result.energy_row(yardstick.idle_w),
    )
    if batch == _TELEMETRY_BATCH and yardstick.counter is not None:
        _measure_telemetry(name, load, yardstick.counter, report)


def _rounds_of(
    loop: DecodeLoop, step: Callable[[], None], batch: int, sizes: _Sizes, setting: Setting
) -> Callable[[], float]:
    """As many steps as the loop has room for, then back to the start; never far ahead of the device."""

    def run_round() -> float:
        loop.reset()
        for index in range(sizes.steps):
            step()
            if index % _SYNC_STEPS == 0:
                setting.synchronize()
        return float(batch * sizes.steps)

    return run_round


def _measure_telemetry(
    name: str, load: Callable[..., LoadResult], counter: Counter, report: SectionReport
) -> None:
    """Throughput without the meter and with it, alternating, so that a drift of the clocks hits both."""
    without, with_meter = [], []
    for _ in range(2):
        without.append(load().tokens_per_s)
        with_meter.append(load(counter=counter, poll_s=_AGENT_POLL_S).tokens_per_s)
    cost = 1.0 - sum(with_meter) / sum(without)
    report.row(model=name, phase="telemetry", tok_per_s_without=max(without), cost_percent=100 * cost)


def _measure_prefill(
    name: str,
    model: BareModel,
    sizes: _Sizes,
    yardstick: Yardstick,
    setting: Setting,
    report: SectionReport,
) -> None:
    ids = torch.randint(0, model.spec.vocab_size, (sizes.chunk,), device=setting.device)
    batch = chunk_batch(model, ids, first_block=1)
    floor_s = prefill_floor_s(
        model.spec, yardstick.rates, num_tokens=sizes.chunk, itemsize=setting.dtype.itemsize
    )

    def launched() -> None:
        model.decoder.logits(batch)

    paths: dict[str, Callable[[], None]] = {"launched": launched}
    if setting.is_cuda:
        launched()
        paths["graph"] = capture(launched)
    for path, run_once in paths.items():
        result = run_load(
            partial(_prefill_round, run_once, sizes.chunk),
            setting.synchronize,
            seconds=setting.window_s,
            counter=yardstick.counter,
        )
        report.row(
            model=name,
            phase="prefill",
            path=path,
            tokens=sizes.chunk,
            tok_per_s=result.tokens_per_s,
            roofline=floor_s * result.tokens_per_s / sizes.chunk,
            **result.energy_row(yardstick.idle_w),
        )


def _prefill_round(run_once: Callable[[], None], num_tokens: int) -> float:
    for _ in range(_PREFILL_RUNS):
        run_once()
    return float(_PREFILL_RUNS * num_tokens)
