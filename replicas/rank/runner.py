"""One rank's shard of a model, run by step plans.

`ModelRunner.build` loads the shard and allocates the KV cache; `launch` runs a plan. All ranks of a group run
the same plans in the same order and return the same ids. Decides nothing about requests.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from replicas.config import EngineLimits, RankConfig
from replicas.errors import BadCheckpoint, RankLost
from replicas.layers.attention import PagedKV
from replicas.layers.experts import StackedExperts
from replicas.layers.kernels.layers import CpuLayers
from replicas.layers.kernels.library import Storage, open_pool
from replicas.layers.quantize import round_weights
from replicas.models.checkpoint import Checkpoint
from replicas.models.costs import costs_of
from replicas.models.decoder import Decoder
from replicas.models.spec import ModelSpec
from replicas.models.weights import ModelWeights, Progress, load_weights
from replicas.parallel.collectives import Collectives, SoloCollectives
from replicas.parallel.degrees import Shard, shard_of
from replicas.plan import NewRow, PendingStep, PlannedRow, StepOutcome, StepPlan
from replicas.rank.batch import Batch, Draw, Rows
from replicas.rank.expert_copies import ExpertStore
from replicas.rank.lanes import Lanes
from replicas.rank.logit_edits import LogitEdits
from replicas.rank.logprobs import measure_logprobs, read_logprobs
from replicas.rank.rank_experts import RankExperts
from replicas.rank.sampler import NOT_FINITE, sample
from replicas.request import TORCH_KERNELS, SamplingParams

_LOAD_SKEW_S = 1800.0
"""How much longer the slowest rank may take to load. A rank that dies meanwhile is noticed at once."""
_WARMUP_DECODES = (1, 2, 8, 32)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class _Finished:
    """A step that ran on the CPU, here and now."""

    outcome: StepOutcome

    def result(self) -> StepOutcome:
        return self.outcome


class _Enqueued:
    """A step on a CUDA device: ids, the experts hit, and logprobs, on their way into pinned memory."""

    def __init__(
        self,
        runner: ModelRunner,
        draws: tuple[Draw, ...],
        words: torch.Tensor,
        logprobs: torch.Tensor | None,
    ) -> None:
        self._runner = runner
        self._draws = draws
        self._words = _to_pinned(words)
        self._logprobs = None if logprobs is None else _to_pinned(logprobs)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def result(self) -> StepOutcome:
        self._event.synchronize()
        return self._runner.outcome(self._draws, self._words.tolist(), self._logprobs)


class ModelRunner:
    """Implements `replicas.plan.Runner`. Owns the shard's weights, KV cache and row state.

    `num_blocks` counts block 0, which is scratch and must never be planned for a sequence.
    """

    def __init__(
        self,
        config: RankConfig,
        collectives: Collectives,
        *,
        spec: ModelSpec,
        shard: Shard,
        weights: ModelWeights,
        weights_digest: str,
    ) -> None:
        limits = config.limits
        self.spec = spec
        self.weights_digest = weights_digest
        self._limits = limits
        self._shard = shard
        self._collectives = collectives
        self._vocab_ranks = SoloCollectives() if shard.is_dispatched else collectives
        self._lanes = Lanes(collectives, max_sequences=limits.max_sequences) if shard.is_dispatched else None
        self._device = weights.embedding_VH.device
        dtype = weights.embedding_VH.dtype
        self.dtype = str(dtype).removeprefix("torch.")
        self.device = _device_name(self._device)
        self.num_blocks = _num_blocks(spec, shard, limits, dtype.itemsize)
        self.context_tokens = _context_tokens(spec, limits)
        kv = self._kv = PagedKV(
            num_layers=spec.num_layers,
            num_blocks=self.num_blocks,
            block_tokens=limits.block_tokens,
            num_kv_heads=shard.num_kv_heads,
            head_dim=spec.head_dim,
            device=self._device,
            dtype=dtype,
        )
        experts = self.experts = RankExperts(spec, shard, config.parallel, collectives, self._device)
        self._kernels = _cpu_layers(config, spec, shard, weights, kv, experts)
        self.kernels = TORCH_KERNELS if self._kernels is None else self._kernels.name
        self.quantization = config.quantization
        weight_bytes = dtype.itemsize if self._kernels is None else self._kernels.bytes_per_weight
        self.costs = costs_of(spec, config.parallel, weight_bytes=weight_bytes, kv_bytes=dtype.itemsize)
        if config.quantization == "int8" and self._kernels is None:
            weights = round_weights(weights)
        self._store: ExpertStore = self._kernels or StackedExperts(weights.layers)
        self._rows = Rows(
            max_sequences=limits.max_sequences,
            max_blocks=-(-self.context_tokens // limits.block_tokens),
            block_tokens=limits.block_tokens,
            device=self._device,
            dtype=dtype,
            has_spans=self._kernels is None,
        )
        self._edits = LogitEdits(max_sequences=limits.max_sequences, shard=shard, device=self._device)
        self._broken_rows: set[int] = set()
        self.decoder = Decoder(
            spec, shard, weights, kv, collectives, self._kernels, experts.tally_LX, experts.routes
        )

    @classmethod
    def build(cls, config: RankConfig, collectives: Collectives, progress: Progress) -> ModelRunner:
        """Load this rank's shard; returns when all ranks have loaded, and the same model."""
        device = torch.device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(config.threads)
            _keep_large_buffers()
        dtype = _dtype_of(config.dtype, device)
        folder = Path(config.source)
        spec = ModelSpec.from_folder(folder)
        shard = shard_of(spec, config.parallel, config.rank)
        with torch.inference_mode(), Checkpoint(folder) as checkpoint:
            weights = load_weights(checkpoint, spec, shard, device=device, dtype=dtype, progress=progress)
            digest = _digest_of(checkpoint.digest(), config)
        runner = cls(config, collectives, spec=spec, shard=shard, weights=weights, weights_digest=digest)
        collectives.barrier(_LOAD_SKEW_S)
        runner._refuse_other_models()
        return runner

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Run a step, or enqueue it. Block tables change here; what was sampled is in the result."""
        for row in self._broken_rows.intersection(plan.freed_rows):
            self._kv.scrub(self._rows.blocks_of(row % self._limits.max_sequences))
            self._broken_rows.remove(row)
        self.experts.before_step(plan.step, self._store)
        lane = None if self._lanes is None else self._lanes.split(plan)
        own = plan if lane is None else lane.plan
        self._rows.apply(own)
        for new in own.new_rows:
            self._edits.set_row(new)
        if not plan.rows:
            return _Finished(StepOutcome(sampled_ids=()))
        batch = self._rows.batch(own, () if lane is None else lane.num_tokens)
        logits_SV, experts_hit = self.decoder.logits(batch)
        ids_S, logprobs = self._sample(batch, logits_SV, None if lane is None else lane.num_best)
        draws = batch.draws
        if lane is not None and self._lanes is not None:
            draws = lane.draws
            ids_S, logprobs = self._lanes.exchange(lane, ids_S, logprobs)
        if self._device.type != "cuda":
            return _Finished(self.outcome(draws, [*ids_S.tolist(), int(experts_hit)], logprobs))
        hit_1 = torch.as_tensor(experts_hit, dtype=torch.int64, device=self._device).view(1)
        return _Enqueued(self, draws, torch.cat((ids_S, hit_1)), logprobs)

    def outcome(
        self, draws: tuple[Draw, ...], words: list[int], logprobs: torch.Tensor | None
    ) -> StepOutcome:
        """From the words a step leaves: ids, then the experts hit. Notes rows that must be scrubbed."""
        *ids, experts_hit = words
        for draw, token_id in zip(draws, ids, strict=True):
            if token_id == NOT_FINITE and (self._lanes is None or draw.row in self._lanes.own_rows):
                self._broken_rows.add(draw.row)
        said = () if logprobs is None else read_logprobs(logprobs.tolist(), draws)
        return StepOutcome(sampled_ids=tuple(ids), experts_hit=experts_hit, logprobs=said)

    def warmup(self) -> None:
        """Run a prefill chunk and a few decode batches on the scratch block, so that kernels are loaded.

        All ranks call it together, before any plan. Leaves no row behind.
        """
        num_tokens = min(self._limits.step_tokens, self.context_tokens)
        chunk = PlannedRow(
            row=0,
            start_pos=0,
            token_ids=(0,) * num_tokens,
            new_blocks=(0,) * -(-num_tokens // self._limits.block_tokens),
            samples=True,
        )
        self._run_alone((chunk,))
        for count in _WARMUP_DECODES:
            if count <= min(self._limits.max_sequences, self._limits.step_tokens):
                self._run_alone(
                    tuple(
                        PlannedRow(row=row, start_pos=0, token_ids=(0,), new_blocks=(0,), samples=True)
                        for row in range(count)
                    )
                )
        self.experts.forget()

    def _sample(
        self, batch: Batch, logits_SV: torch.Tensor, num_best: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The ids of this rank's draws, remembered for the next step, and their logprobs if one asks."""
        draws = batch.draws
        if not draws:
            return batch.sampled_S, None
        ids_S = sample(self._edits.apply(logits_SV, draws), draws, self._shard, self._vocab_ranks)
        self._rows.remember(draws, ids_S)
        self._edits.remember(draws, ids_S)
        return ids_S, measure_logprobs(logits_SV, ids_S, draws, self._vocab_ranks, num_best=num_best)

    def close(self) -> None:
        """Release weights, cache and collectives. The runner cannot be used afterwards."""
        self._collectives.close()
        if self._kernels is not None:
            self._kernels.close()
        del self.decoder, self._kv, self._rows

    def _run_alone(self, rows: tuple[PlannedRow, ...]) -> None:
        """In every lane."""
        max_sequences, num_lanes = self._limits.max_sequences, 1 if self._lanes is None else self._lanes.count
        planned = tuple(
            replace(row, row=lane * max_sequences + row.row) for lane in range(num_lanes) for row in rows
        )
        new_rows = tuple(NewRow(row=row.row, sampling=SamplingParams()) for row in planned)
        self.launch(StepPlan(step=0, freed_rows=(), new_rows=new_rows, rows=planned)).result()
        freed_rows = tuple(row.row for row in planned)
        self.launch(StepPlan(step=0, freed_rows=freed_rows, new_rows=(), rows=())).result()

    def _refuse_other_models(self) -> None:
        """Ranks that read different folders, or sized their caches differently, would diverge silently."""
        digest = bytes.fromhex(self.weights_digest)
        words = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, len(digest), 4)]
        mine = torch.tensor([*words, self.num_blocks, self.context_tokens], device=self._device)
        for rank, theirs in enumerate(self._collectives.all_gather(mine)):
            if not torch.equal(theirs, mine):
                raise RankLost(
                    f"rank {rank} loaded another model or cache than rank {self._collectives.rank}: "
                    f"{theirs.tolist()} against {mine.tolist()} (digest words, blocks, context)"
                )


def _to_pinned(values: torch.Tensor) -> torch.Tensor:
    """A copy that is complete once the stream has come this far."""
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values, non_blocking=True)


def _dtype_of(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on CUDA; float32 on CPUs, where half precision is 2 to 9 times slower."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def _digest_of(checkpoint_digest: str, config: RankConfig) -> str:
    """Rounded weights are other weights; and ranks that split rows round each part by itself."""
    if config.quantization == "none":
        return checkpoint_digest
    parallel = config.parallel
    rounded = f"{checkpoint_digest} {config.quantization} {parallel.tensor} {parallel.expert}"
    return hashlib.blake2b(rounded.encode(), digest_size=16).hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cpu_layers(
    config: RankConfig,
    spec: ModelSpec,
    shard: Shard,
    weights: ModelWeights,
    kv: PagedKV,
    experts: RankExperts,
) -> CpuLayers | None:
    """The compiled kernels where they serve: float32 on a CPU with a compiler. Torch then needs one thread:
    two pools would fight for the same cores."""
    dtype, device = weights.embedding_VH.dtype, weights.embedding_VH.device
    if config.kernels == "off" or device.type != "cpu" or dtype != torch.float32:
        return None
    pool = open_pool(config.threads)
    if pool is None:
        return None
    storage = Storage.SMALLEST if config.kernels == "auto" else Storage.FLOAT32
    if config.quantization == "int8":
        storage = Storage.INT8
    layers = CpuLayers(pool, spec, shard, weights, kv, experts.tally_LX, experts.routes, storage=storage)
    torch.set_num_threads(1)
    return layers


def _num_blocks(spec: ModelSpec, shard: Shard, limits: EngineLimits, itemsize: int) -> int:
    """The configured number, or as many as fit `kv_cache_bytes`: the same on every rank of a group."""
    block_bytes = 2 * spec.num_layers * limits.block_tokens * shard.num_kv_heads * spec.head_dim * itemsize
    num_blocks = limits.num_blocks or limits.kv_cache_bytes // block_bytes
    if num_blocks < 2:
        raise BadCheckpoint(
            f"limits give {num_blocks} KV blocks (num_blocks={limits.num_blocks}, "
            f"kv_cache_bytes={limits.kv_cache_bytes}); at least 2 blocks of {block_bytes} bytes are needed"
        )
    return num_blocks


def _context_tokens(spec: ModelSpec, limits: EngineLimits) -> int:
    if limits.context_tokens > spec.context_tokens:
        raise BadCheckpoint(
            f"limits.context_tokens={limits.context_tokens} is above the model's "
            f"max_position_embeddings={spec.context_tokens}; lower it, or 0 for the model's own"
        )
    return limits.context_tokens or spec.context_tokens


def _keep_large_buffers() -> None:
    """Have glibc reuse freed blocks of up to 32 MiB: fresh pages for every large activation cost up to 4x."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 512 * 2**20)
