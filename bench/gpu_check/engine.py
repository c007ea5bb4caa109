"""Section `engine`: the rank that serves, driven by step plans: whether its graphs are right, and its speed.

The same `ModelRunner` as in a replica, on random weights: packed uploads, graphs per batch size, one step
planned ahead with placeholders for tokens not yet known. Only scheduler, sockets and text are left out, and
what separates it from the bare graph of section `speed` is the time of the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.gpu_check.report import SectionReport
from bench.gpu_check.roofline import costs
from bench.gpu_check.setting import Setting
from bench.gpu_check.shapes import Shape, random_weights, served_shapes, small_shapes, spec_of
from bench.gpu_check.steady_load import run_load
from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.models.spec import ModelSpec
from replicas.parallel.collectives import SoloCollectives
from replicas.parallel.degrees import shard_of
from replicas.plan import LAST_SAMPLED, NewRow, PendingStep, PlannedRow, StepPlan
from replicas.rank.device_kernels import load_device_kernels
from replicas.rank.device_steps import DeviceSupport
from replicas.rank.graphs import CudaGraphBackend, EagerBackend
from replicas.rank.runner import ModelRunner
from replicas.rank.transfer import CudaTransfer, HostTransfer
from replicas.request import SamplingParams

_BATCHES = (1, 64, 256)
_PAGE = 16
_SPARE_BYTES = 6 * 2**30


class EngineLoop:
    """Decodes `batch` sequences from `start_pos` for `num_steps`, one step ahead; then frees their rows.

    Row i owns its own blocks. What they hold before `start_pos` is whatever was there.
    """

    def __init__(self, runner: ModelRunner, *, batch: int, start_pos: int, num_steps: int) -> None:
        self._runner = runner
        self._rows = range(batch)
        self._start_pos = start_pos
        self._num_steps = num_steps
        self._pages = -(-(start_pos + num_steps) // _PAGE)

    def tokens(self) -> list[tuple[int, ...]]:
        """The tokens of every step."""
        drawn = []
        pending: PendingStep | None = None
        for step in range(self._num_steps):
            launched = self._runner.launch(self._plan(step))
            if pending is not None:
                drawn.append(pending.result().sampled_ids)
            pending = launched
        if pending is not None:
            drawn.append(pending.result().sampled_ids)
        freed = StepPlan(step=self._num_steps, freed_rows=tuple(self._rows), new_rows=(), rows=())
        self._runner.launch(freed).result()
        return drawn

    def run_round(self) -> float:
        return float(sum(len(ids) for ids in self.tokens()))

    def _plan(self, step: int) -> StepPlan:
        is_first = step == 0
        return StepPlan(
            step=step,
            freed_rows=(),
            new_rows=tuple(NewRow(row=row, sampling=SamplingParams()) for row in self._rows if is_first),
            rows=tuple(
                PlannedRow(
                    row=row,
                    start_pos=self._start_pos + step,
                    token_ids=(3 + row if is_first else LAST_SAMPLED,),
                    new_blocks=self._blocks(row) if is_first else (),
                    samples=True,
                )
                for row in self._rows
            ),
        )

    def _blocks(self, row: int) -> tuple[int, ...]:
        first = 1 + row * self._pages
        return tuple(range(first, first + self._pages))


def run(setting: Setting, report: SectionReport) -> None:
    shapes = small_shapes(is_tiny=setting.is_tiny)
    for shape in shapes[-1:] if setting.is_tiny else shapes:
        _check_graphs(shape, setting, report)
    if not setting.is_cuda:
        report.skip("tok/s of the served shapes: they need a GPU")
        return
    for shape in served_shapes():
        if not report.has_time(15.0):
            report.skip(f"{shape.name}: out of time")
            continue
        _measure(shape, setting, report)


def _check_graphs(shape: Shape, setting: Setting, report: SectionReport) -> None:
    """The tokens of a runner with graphs are those of one that launches every step."""
    batch, num_steps = (2, 2) if setting.is_tiny else (5, 24)
    start_pos = 4 if setting.is_tiny else 40
    drawn = []
    for has_graphs in (False, True):
        runner = _make_runner(shape, batch, start_pos + num_steps, setting, has_graphs=has_graphs)
        if setting.is_cuda:
            runner.warmup()
        drawn.append(EngineLoop(runner, batch=batch, start_pos=start_pos, num_steps=num_steps).tokens())
        runner.close()
    path = "graphs against launches" if setting.is_cuda else "static buffers against none"
    report.check(drawn[0] == drawn[1], model=shape.name, batch=batch, steps=num_steps, path=path)


def _measure(shape: Shape, setting: Setting, report: SectionReport) -> None:
    context, num_steps = 960, 128
    spec = spec_of(shape)
    pages = -(-(context + num_steps) // _PAGE)
    block_bytes = costs(spec, setting.dtype.itemsize).kv_bytes_per_token * _PAGE
    room = setting.free_bytes() - _SPARE_BYTES - _weight_bytes(spec, setting.dtype.itemsize)
    batches = [batch for batch in _BATCHES if batch * pages * block_bytes < room]
    if not batches:
        report.skip(f"{shape.name}: the device has too little memory")
        return
    runner = _make_runner(shape, max(batches), context + num_steps, setting, has_graphs=True)
    runner.warmup()
    for batch in batches:
        loop = EngineLoop(runner, batch=batch, start_pos=context, num_steps=num_steps)
        result = run_load(loop.run_round, setting.synchronize, seconds=setting.window_s)
        report.row(
            model=shape.name,
            phase="decode",
            path="engine",
            batch=batch,
            tok_per_s=result.tokens_per_s,
            ms_per_step=1e3 * batch / result.tokens_per_s,
        )
    runner.close()


def _weight_bytes(spec: ModelSpec, itemsize: int) -> int:
    """All of them: experts at rest too, and the embedding beside the head."""
    cost = costs(spec, itemsize)
    experts = spec.num_layers * spec.num_experts * cost.expert_bytes
    return cost.shared_weight_bytes + experts + spec.vocab_size * spec.hidden_size * itemsize


@torch.inference_mode()
def _make_runner(
    shape: Shape, batch: int, context_tokens: int, setting: Setting, *, has_graphs: bool
) -> ModelRunner:
    spec = spec_of(shape)
    parallel = ParallelConfig()
    shard = shard_of(spec, parallel, 0)
    pages = -(-context_tokens // _PAGE)
    limits = EngineLimits(
        max_sequences=batch,
        step_tokens=max(batch, 64),
        block_tokens=_PAGE,
        num_blocks=1 + batch * pages,
        context_tokens=pages * _PAGE,
        lookahead=1,
    )
    config = RankConfig(
        group="gpu-check",
        epoch=0,
        rank=0,
        source="random",
        parallel=parallel,
        limits=limits,
        device=setting.device.type,
    )
    return ModelRunner(
        config,
        SoloCollectives(),
        spec=replace(spec, context_tokens=max(spec.context_tokens, limits.context_tokens)),
        shard=shard,
        weights=random_weights(spec, shard, device=setting.device, dtype=setting.dtype),
        weights_digest="00" * 32,
        support=_support(setting, has_graphs=has_graphs),
    )


def _support(setting: Setting, *, has_graphs: bool) -> DeviceSupport:
    kernels = load_device_kernels()
    assert kernels is not None, "the check does not begin without Triton"
    if setting.is_cuda:
        graphs = CudaGraphBackend() if has_graphs else None
        return DeviceSupport(transfer=CudaTransfer(setting.device), graphs=graphs, kernels=kernels)
    return DeviceSupport(
        transfer=HostTransfer(), graphs=EagerBackend() if has_graphs else None, kernels=kernels
    )
