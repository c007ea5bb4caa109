"""Steps on a device: everything the host knows goes down in one copy, nothing is waited for.

A step of decode rows alone is replayed from a graph where there are graphs; one with prefill is run from the
host, decode rows and chunks together. Rows that ask for nothing but a temperature are drawn within the graph;
others are drawn again behind it, from its logits. Called by `runner.py`, which owns the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from replicas.parallel.collectives import Collectives
from replicas.parallel.degrees import Shard
from replicas.plan import StepPlan
from replicas.rank.batch import Batch, Draw, FlatStep, Rows
from replicas.rank.buckets import KEY, TEMPERATURE, bucket_of, decode_words
from replicas.rank.device_batch import DeviceRows
from replicas.rank.device_kernels import DeviceKernels
from replicas.rank.graphs import Decoded, DecodeGraphs, GraphBackend
from replicas.rank.logit_edits import Edits, LogitEdits
from replicas.rank.logprobs import (
    Asked,
    StagedTargets,
    measure_logprobs,
    measure_targets,
    stage_logprobs,
    stage_targets,
)
from replicas.rank.pending import EnqueuedStep, OutcomeReader
from replicas.rank.sampler import Sampling, best_tokens, draw_tokens, pick_tokens, stage_sampling
from replicas.rank.transfer import Part, Transfer, Upload

RunBatch = Callable[[Batch], tuple[torch.Tensor, torch.Tensor | int]]
"""The decoder: float32 logits of this rank's vocabulary rows, and the experts hit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSupport:
    """What a device offers beside its arithmetic. `graphs` None: every step is run from the host; `kernels`
    None: torch computes."""

    transfer: Transfer
    graphs: GraphBackend | None
    kernels: DeviceKernels | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _StagedDraws:
    """How the draws of a step are made, on its way to the device."""

    rows_S: Part
    edits: Edits
    sampling: Sampling
    asked: Asked | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """What the steps of a rank are made of; all of it the runner's own."""

    run: RunBatch
    reader: OutcomeReader
    rows: Rows
    device_rows: DeviceRows
    edits: LogitEdits
    shard: Shard
    collectives: Collectives
    has_spans: bool
    """Whether the decoder reads spans, as torch does, or device sequences, as kernels do."""


class DeviceSteps:
    """Runs plans on a device; owns the graphs. `sizes` are the batch sizes that have one, if any has."""

    def __init__(self, parts: StepParts, support: DeviceSupport, sizes: tuple[int, ...]) -> None:
        self._parts = parts
        self._transfer = support.transfer
        self._best_tokens = best_tokens if support.kernels is None else support.kernels.best_tokens
        self.graphs: DecodeGraphs | None = None
        if support.graphs is not None:
            self.graphs = DecodeGraphs(
                self._decode,
                sizes,
                support.graphs,
                vocab_rows=parts.shard.vocab_rows,
                device=parts.device_rows.device,
            )

    def capture(self) -> None:
        """Record the graphs, if there are any; all ranks together, when the cache has its size."""
        if self.graphs is not None:
            self.graphs.capture()

    def launch(self, plan: StepPlan) -> EnqueuedStep:
        """Enqueue an applied plan that has rows."""
        flat = self._parts.rows.flatten(plan)
        upload = Upload(self._transfer)
        blocks = self._parts.device_rows.stage_blocks(plan, upload)
        if self.graphs is not None and flat.num_decodes == len(flat.ordered) and not flat.targets:
            size = bucket_of(flat.num_decodes, self.graphs.sizes)
            padding_row = self._parts.device_rows.padding_row
            words = upload.add(decode_words(flat, size=size, padding_row=padding_row))
            staged = None if _are_drawn_within(flat.draws) else self._stage_draws(flat.draws, upload)
            places = upload.integers(flat.sampled) if staged else None
            upload.send()
            self._parts.device_rows.append(blocks)
            return self._replay(self.graphs, flat, words, staged, places)
        batch = self._parts.device_rows.stage(flat, upload)
        staged = self._stage_draws(flat.draws, upload) if flat.draws else None
        targets = stage_targets(flat.targets, upload)
        upload.send()
        self._parts.device_rows.append(blocks)
        logits_SV, experts_hit = self._parts.run(
            self._parts.device_rows.batch(batch, has_spans=self._parts.has_spans)
        )
        return self._finish(flat, logits_SV, _as_words(experts_hit, logits_SV.device), staged, targets)

    def _replay(
        self,
        graphs: DecodeGraphs,
        flat: FlatStep,
        words: Part,
        staged: _StagedDraws | None,
        places: Part | None,
    ) -> EnqueuedStep:
        logits_BV, outputs_B1 = graphs.replay(words.tensor)
        if staged is None or places is None:
            fetch = self._transfer.fetch((outputs_B1,))
            return EnqueuedStep(reader=self._parts.reader, drawn=flat, places=flat.sampled, fetch=fetch)
        return self._finish(flat, logits_BV.index_select(0, places.tensor), outputs_B1[-1:], staged)

    def _finish(
        self,
        flat: FlatStep,
        logits_SV: torch.Tensor,
        hit_1: torch.Tensor,
        staged: _StagedDraws | None,
        targets: StagedTargets | None = None,
    ) -> EnqueuedStep:
        """Draw the tokens and score those that are known, if any are asked for, and send them up."""
        collectives, num_draws = self._parts.collectives, len(flat.draws)
        words, logprobs = hit_1, None
        if staged is not None:
            drawn_SV = logits_SV[:num_draws]
            edited_SV = self._parts.edits.apply(drawn_SV, staged.edits)
            ids_S = draw_tokens(edited_SV, staged.sampling, self._parts.shard, collectives)
            self._parts.device_rows.remember(staged.rows_S.tensor, ids_S)
            self._parts.edits.remember(staged.edits, ids_S)
            logprobs = measure_logprobs(drawn_SV, ids_S, staged.asked, collectives)
            words = torch.cat((ids_S, hit_1))
        scores = measure_targets(logits_SV[num_draws:], targets, collectives)
        said = tuple(tensor for tensor in (words, logprobs, scores) if tensor is not None)
        return EnqueuedStep(
            reader=self._parts.reader,
            drawn=flat,
            places=range(num_draws),
            has_logprobs=logprobs is not None,
            fetch=self._transfer.fetch(said),
        )

    def _decode(self, words_6B: torch.Tensor) -> Decoded:
        """What a graph records."""
        ids_B, positions_B, slots_B, rows_B = words_6B[:KEY].unbind(0)
        logits_BV, experts_hit = self._parts.run(
            self._parts.device_rows.decode_batch(
                ids_B, positions_B, slots_B, rows_B, has_spans=self._parts.has_spans
            )
        )
        keys_B2 = words_6B[KEY].view(torch.int32).view(-1, 2)
        temperature_B = words_6B[TEMPERATURE].view(torch.float64).to(torch.float32)
        ids_B = pick_tokens(
            logits_BV,
            keys_B2,
            temperature_B,
            self._parts.shard,
            self._parts.collectives,
            self._best_tokens,
        )
        self._parts.device_rows.remember(rows_B, ids_B)
        return Decoded(logits_BV=logits_BV, ids_B=ids_B, experts_hit=experts_hit)

    def _stage_draws(self, draws: tuple[Draw, ...], upload: Upload) -> _StagedDraws:
        return _StagedDraws(
            rows_S=upload.integers([draw.row for draw in draws]),
            edits=self._parts.edits.stage(draws, upload),
            sampling=stage_sampling(draws, upload),
            asked=stage_logprobs(draws, upload),
        )


def _are_drawn_within(draws: tuple[Draw, ...]) -> bool:
    """Whether a graph draws what these rows ask for."""
    return all(draw.sampling.is_temperature_only for draw in draws)


def _as_words(experts_hit: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    if isinstance(experts_hit, torch.Tensor):
        return experts_hit.to(torch.int64).view(1)
    return torch.full((1,), experts_hit, dtype=torch.int64, device=device)
