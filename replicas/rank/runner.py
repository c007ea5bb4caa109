"""One rank's shard of a model, run by step plans.

`ModelRunner.build` loads the shard and allocates the KV cache; `launch` runs a plan. All ranks of a group run
the same plans in the same order and return the same ids. Decides nothing about requests.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from replicas.config import RankConfig
from replicas.errors import RankLost
from replicas.layers.attention import PagedKV
from replicas.layers.experts import StackedExperts
from replicas.layers.quantize import round_weights
from replicas.models.checkpoint import Checkpoint
from replicas.models.costs import costs_of
from replicas.models.decoder import Decoder
from replicas.models.spec import ModelSpec
from replicas.models.weights import ModelWeights, Progress, load_weights
from replicas.parallel.collectives import Collectives, SoloCollectives, device_of
from replicas.parallel.degrees import Shard, shard_of
from replicas.plan import NewRow, PendingStep, PlannedRow, StepOutcome, StepPlan
from replicas.rank.attention_probe import AttentionProbe, ProbedSteps, settle_attention
from replicas.rank.batch import Batch, Rows
from replicas.rank.buckets import bucket_sizes, chunk_sizes
from replicas.rank.device_batch import DeviceRows
from replicas.rank.device_clock import DeviceClock
from replicas.rank.device_kernels import TRITON_KERNELS, VARLEN_KERNELS
from replicas.rank.device_memory import (
    PROBE_BLOCKS,
    blocks_that_fit,
    configured_blocks,
    measure_step_bytes,
    read_device_memory,
)
from replicas.rank.device_setup import (
    context_tokens,
    cpu_layers,
    cuda_support,
    device_name,
    digest_of,
    dtype_of,
    keep_large_buffers,
    kv_block_bytes,
)
from replicas.rank.device_steps import DeviceSteps, DeviceSupport, StepParts
from replicas.rank.expert_copies import ExpertStore
from replicas.rank.lanes import Lanes, LaneStep, Sampled
from replicas.rank.logit_edits import LogitEdits
from replicas.rank.logprobs import (
    measure_logprobs,
    measure_targets,
    read_logprobs,
    read_scores,
    stage_logprobs,
    stage_targets,
)
from replicas.rank.pending import Drawn, FinishedStep
from replicas.rank.rank_experts import RankExperts
from replicas.rank.sampler import NOT_FINITE, Peaks, draw_tokens, peaks, stage_sampling
from replicas.rank.transfer import Upload
from replicas.request import TORCH_KERNELS, SamplingParams

if TYPE_CHECKING:  # Needs Triton.
    from replicas.layers.triton.page_attention import PageAttention

_LOAD_SKEW_S = 1800.0
"""How much longer the slowest rank may take to load. A rank that dies meanwhile is noticed at once."""
_WARMUP_DECODES = (1, 2, 8, 32)


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
        support: DeviceSupport | None = None,
    ) -> None:
        limits = config.limits
        self.spec = spec
        self.weights_digest = weights_digest
        self._limits = limits
        self._timeout_s = config.collective_timeout_s
        self._shard = shard
        self._collectives = collectives
        self._vocab_ranks = SoloCollectives() if shard.is_dispatched else collectives
        self._lanes = Lanes(collectives, max_sequences=limits.max_sequences) if shard.is_dispatched else None
        self._device = weights.embedding_VH.device
        dtype = weights.embedding_VH.dtype
        self.dtype = str(dtype).removeprefix("torch.")
        self.device = device_name(self._device)
        self._block_bytes = kv_block_bytes(spec, shard, limits.block_tokens, dtype.itemsize)
        is_sized_later = self._device.type == "cuda" and not limits.has_fixed_cache
        self.num_blocks = (
            PROBE_BLOCKS if is_sized_later else configured_blocks(limits, block_bytes=self._block_bytes)
        )
        self.context_tokens = context_tokens(spec, limits)
        kv = self._kv = self._new_cache(dtype)
        experts = self.experts = RankExperts(spec, shard, config.parallel, collectives, self._device)
        self._kernels = cpu_layers(config, spec, shard, weights, kv, experts)
        self.quantization = config.quantization
        weight_bytes = dtype.itemsize if self._kernels is None else self._kernels.bytes_per_weight
        self.costs = costs_of(spec, config.parallel, weight_bytes=weight_bytes, kv_bytes=dtype.itemsize)
        if config.quantization == "int8" and self._kernels is None:
            weights = round_weights(weights)
        self._find_peaks: Peaks = peaks if self._kernels is None else self._kernels.peaks
        self._store: ExpertStore = self._kernels or StackedExperts(weights.layers)
        device_kernels = None if support is None else support.kernels
        device_layers = None if device_kernels is None else device_kernels.layers(spec, shard, weights, kv)
        self._pages = None if device_layers is None else device_layers.pages
        self._asked_attention = config.attention
        self._has_spans = device_layers is None
        self.kernels = TORCH_KERNELS if self._kernels is None else self._kernels.name
        if device_layers is not None:
            self.kernels = TRITON_KERNELS
        max_blocks = -(-self.context_tokens // limits.block_tokens)
        self._rows = self._new_rows(max_blocks, dtype)
        self._edits = LogitEdits(max_sequences=limits.max_sequences, shard=shard, device=self._device)
        counted = (experts.tally_LX, experts.routes)
        self.decoder = Decoder(
            spec, shard, weights, kv, collectives, self._kernels, *counted, device_layers=device_layers
        )
        self._support = support
        self._steps = None if support is None else self._device_steps(support, max_blocks)

    @classmethod
    def build(
        cls,
        config: RankConfig,
        collectives: Collectives,
        progress: Progress,
        support: DeviceSupport | None = None,
    ) -> ModelRunner:
        """Load this rank's shard; returns when all ranks have loaded, and the same model.

        `support` None: what the device has; a CPU runs its steps here and now.
        """
        device = device_of(config)
        folder, spec = Path(config.source), config.spec
        assert spec is not None, "whoever starts ranks has read the spec"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            support = support or cuda_support(config, spec, device)
        else:
            torch.set_num_threads(config.threads)
            keep_large_buffers()
        dtype = dtype_of(config.dtype, device)
        shard = shard_of(spec, config.parallel, config.rank)
        with torch.inference_mode(), Checkpoint(folder) as checkpoint:
            weights = load_weights(checkpoint, spec, shard, device=device, dtype=dtype, progress=progress)
            digest = digest_of(checkpoint.digest(), config)
        runner = cls(
            config,
            collectives,
            spec=spec,
            shard=shard,
            weights=weights,
            weights_digest=digest,
            support=support,
        )
        collectives.barrier(_LOAD_SKEW_S)
        if device.type == "cuda" and not config.limits.has_fixed_cache:
            runner.size_cache()
        runner._refuse_other_models()
        return runner

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Run a step, or enqueue it. Block tables change here; what was sampled is in the result."""
        self.experts.before_step(plan.step, self._store)
        lane = None if self._lanes is None else self._lanes.split(plan)
        own = plan if lane is None else lane.plan
        if blocks := self._rows.take_doubtful_blocks(own.freed_rows):
            self._scrub(blocks)
        self._rows.apply(own)
        for new in own.new_rows:
            self._edits.set_row(new)
        if not plan.rows:
            return FinishedStep(StepOutcome(sampled_ids=()))
        if self._steps is not None:
            return self._steps.launch(plan)
        batch = self._rows.batch(own, () if lane is None else lane.num_tokens)
        logits_SV, experts_hit = self.decoder.logits(batch)
        sampled = self._sample(batch, logits_SV, lane)
        if lane is not None and self._lanes is not None:
            sampled = self._lanes.exchange(lane, sampled)
        words = [*sampled.ids_S.tolist(), int(experts_hit)]
        return FinishedStep(self.outcome(lane or batch, words, sampled.logprobs_MK, sampled.scores_MK))

    def outcome(
        self,
        drawn: Drawn,
        words: list[int],
        logprobs: torch.Tensor | None,
        scores: torch.Tensor | None,
    ) -> StepOutcome:
        """From the words a step leaves: ids, then the experts hit. Notes whose logits are finite."""
        *ids, experts_hit = words
        has_doubts = self._rows.has_doubts
        for draw, token_id in zip(drawn.draws, ids, strict=True):
            is_finite = token_id != NOT_FINITE
            if is_finite and not has_doubts:
                continue
            if self._lanes is None or draw.row in self._lanes.own_rows:
                self._rows.note_logits(draw.row % self._limits.max_sequences, are_finite=is_finite)
        return StepOutcome(
            sampled_ids=tuple(ids),
            experts_hit=experts_hit,
            logprobs=() if logprobs is None else read_logprobs(logprobs.tolist(), drawn.draws),
            scores=() if scores is None else read_scores(scores.tolist(), drawn.targets),
        )

    @torch.inference_mode()
    def warmup(self) -> None:
        """Run prefill chunks and a few decode batches on the scratch block, so that kernels are loaded or
        compiled, and record the graphs. Leaves no row behind.

        All ranks call it together, before any plan. From then on no peer may be late.
        """
        if self._pages is not None:
            self._settle_attention(self._pages)
        most_tokens = min(self._limits.step_tokens, self.context_tokens)
        for num_tokens in (most_tokens,) if self._steps is None else chunk_sizes(most_tokens):
            self._run_chunk(num_tokens)
        for count in _WARMUP_DECODES:
            if count <= min(self._limits.max_sequences, self._limits.step_tokens):
                self._run_decodes(count)
        if self._steps is not None:
            self._steps.capture()
        self.experts.forget()
        self._collectives.set_timeout(self._timeout_s)

    def close(self) -> None:
        """Release weights, cache and collectives. The runner cannot be used afterwards."""
        self._collectives.close()
        if self._kernels is not None:
            self._kernels.close()
        del self.decoder, self._kv, self._rows

    def _sample(self, batch: Batch, logits_SV: torch.Tensor, lane: LaneStep | None) -> Sampled:
        """The ids of this rank's draws, remembered for the next step, and what is asked for beside them."""
        upload, draws, ranks = Upload(), batch.draws, self._vocab_ranks
        edits = self._edits.stage(draws, upload) if draws else None
        sampling = stage_sampling(draws, upload)
        asked = stage_logprobs(draws, upload, most=None if lane is None else lane.most_logprobs)
        targets = stage_targets(batch.targets, upload, most=None if lane is None else lane.most_scores)
        upload.send()
        scores = measure_targets(logits_SV[len(draws) :], targets, ranks)
        if edits is None:
            return Sampled(ids_S=batch.sampled_S[:0], scores_MK=scores)
        logits_SV = logits_SV[: len(draws)]
        edited_SV = self._edits.apply(logits_SV, edits)
        ids_S = draw_tokens(edited_SV, sampling, self._shard, ranks, self._find_peaks)
        self._rows.remember(draws, ids_S)
        self._edits.remember(edits, ids_S)
        logprobs = measure_logprobs(logits_SV, ids_S, asked, ranks)
        return Sampled(ids_S=ids_S, logprobs_MK=logprobs, scores_MK=scores)

    def _new_cache(self, dtype: torch.dtype) -> PagedKV:
        return PagedKV(
            num_layers=self.spec.num_layers,
            num_blocks=self.num_blocks,
            block_tokens=self._limits.block_tokens,
            num_kv_heads=self._shard.num_kv_heads,
            head_dim=self.spec.head_dim,
            device=self._device,
            dtype=dtype,
        )

    def _new_rows(self, max_blocks: int, dtype: torch.dtype) -> Rows:
        return Rows(
            max_sequences=self._limits.max_sequences,
            max_blocks=max_blocks,
            block_tokens=self._limits.block_tokens,
            device=self._device,
            dtype=dtype,
            has_spans=self._kernels is None and self._has_spans,
        )

    def _device_steps(self, support: DeviceSupport, max_blocks: int) -> DeviceSteps:
        limits = self._limits
        device_rows = DeviceRows(
            self._rows,
            max_sequences=limits.max_sequences,
            max_blocks=max_blocks,
            block_tokens=limits.block_tokens,
            device=self._device,
            dtype=self._kv.keys[0].dtype,
        )
        parts = StepParts(
            run=self._logits,
            reader=self,
            rows=self._rows,
            device_rows=device_rows,
            edits=self._edits,
            shard=self._shard,
            collectives=self._collectives,
            has_spans=self._has_spans,
        )
        sizes = bucket_sizes(min(limits.max_sequences, limits.step_tokens))
        return DeviceSteps(parts, support, sizes)

    def _settle_attention(self, pages: PageAttention) -> None:
        """Before anything is compiled or captured for steps to come."""
        steps = ProbedSteps(
            limits=self._limits, num_heads=self._shard.num_heads, context_tokens=self.context_tokens
        )
        clock = DeviceClock(has_graphs=self._support is not None and self._support.graphs is not None)
        probe = AttentionProbe(pages, self._kv, steps, clock)
        pages.choice = settle_attention(self._asked_attention, probe, self._collectives)
        self.kernels = VARLEN_KERNELS if pages.choice.has_varlen else TRITON_KERNELS

    def _logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | int]:
        return self.decoder.logits(batch)

    @torch.inference_mode()
    def size_cache(self) -> None:
        """Take what the device has left for the KV cache: the same number of blocks on all ranks."""
        most_tokens = min(self._limits.step_tokens, self.context_tokens)
        step_bytes = measure_step_bytes(self._device, lambda: self._run_chunk(most_tokens))
        most_rows = min(self._limits.max_sequences, self._limits.step_tokens)
        graph_bytes = measure_step_bytes(self._device, lambda: self._run_decodes(most_rows))
        memory = read_device_memory(self._device, step_bytes=step_bytes, graph_bytes=graph_bytes)
        ratio = self._limits.gpu_memory_ratio
        mine = blocks_that_fit(memory, ratio=ratio, block_bytes=self._block_bytes)
        every_rank = self._collectives.all_gather(torch.tensor([mine], device=self._device))
        self.num_blocks = int(every_rank.min())
        self._kv.resize(self.num_blocks)

    def _scrub(self, blocks: list[int]) -> None:
        """Before others get the blocks of a row whose numbers broke, or may have."""
        upload = Upload(None if self._support is None else self._support.transfer)
        index = upload.integers(blocks)
        upload.send()
        self._kv.scrub(index.tensor)

    def _run_chunk(self, num_tokens: int) -> None:
        """A prefill into scratch."""
        chunk = PlannedRow(
            row=0,
            start_pos=0,
            token_ids=(0,) * num_tokens,
            new_blocks=(0,) * -(-num_tokens // self._limits.block_tokens),
            samples=True,
        )
        self._run_alone((chunk,))

    def _run_decodes(self, count: int) -> None:
        """A decode step of `count` rows, into scratch."""
        self._run_alone(
            tuple(
                PlannedRow(row=row, start_pos=0, token_ids=(0,), new_blocks=(0,), samples=True)
                for row in range(count)
            )
        )

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
