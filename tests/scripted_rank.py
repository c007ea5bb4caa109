"""A rank that follows a fixed script instead of a scheduler: sequences that join, are chunked, and leave.

Every rank runs the same script on its own runner; only ids that the runner returned steer it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.queues import Queue
from pathlib import Path

import torch

from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.models.decoder import Decoder
from replicas.parallel.collectives import Collectives, SoloCollectives, make_collectives
from replicas.plan import LAST_SAMPLED, NewRow, PlannedRow, StepPlan
from replicas.rank.batch import Batch
from replicas.rank.runner import ModelRunner
from replicas.request import SamplingParams
from tests.rank_processes import Report
from tests.rank_threads import make_rank_config

LIMITS = EngineLimits(max_sequences=6, step_tokens=64, block_tokens=8, num_blocks=64, context_tokens=256)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedSequence:
    """Joins at `join_step`, prefills in pieces of `chunk_tokens`, leaves after `num_tokens` new tokens.

    `lane` counts in the `dispatch` layout alone.
    """

    prompt_ids: tuple[int, ...]
    num_tokens: int
    join_step: int = 0
    chunk_tokens: int = 1000
    lane: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(slots=True, kw_only=True)
class ScriptedResult:
    """What a script gave: token ids and whole-vocabulary logits rows of every sequence; experts per step.

    In the `dispatch` layout a rank has the logits of its own lane alone.
    """

    token_ids: list[list[int]]
    logits: list[list[torch.Tensor]]
    experts_hit: list[int]


class RecordingDecoder(Decoder):
    """Passes steps on to a decoder, and keeps the logits of all ranks."""

    def __init__(
        self, inner: Decoder, collectives: Collectives, vocab_size: int, first_row: int | None
    ) -> None:
        self._inner = inner
        self._ranks = collectives if first_row is None else SoloCollectives()
        self._first_row = first_row or 0
        self._vocab_size = vocab_size
        self.last: dict[int, torch.Tensor] = {}

    def logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | int]:
        logits_SV, experts_hit = self._inner.logits(batch)
        whole = self._ranks.all_gather(logits_SV).transpose(0, 1).flatten(1)[:, : self._vocab_size]
        self.last = {
            self._first_row + draw.row: row.clone() for draw, row in zip(batch.draws, whole, strict=True)
        }
        return logits_SV, experts_hit


class _Live:
    """A sequence that holds a row: its tokens, blocks, and how far they are computed."""

    def __init__(self, row: int, script: ScriptedSequence) -> None:
        self.row = row
        self.script = script
        self.token_ids = list(script.prompt_ids)
        self.blocks: list[int] = []
        self.computed = 0

    def plan(self, free_blocks: list[int], *, is_placeholder: bool) -> PlannedRow:
        chunk = self.token_ids[self.computed : self.computed + self.script.chunk_tokens]
        start, end = self.computed, self.computed + len(chunk)
        new_blocks = []
        while len(self.blocks) * LIMITS.block_tokens < end:
            self.blocks.append(free_blocks.pop())
            new_blocks.append(self.blocks[-1])
        samples = end == len(self.token_ids)
        if is_placeholder and start >= len(self.script.prompt_ids):
            chunk = [LAST_SAMPLED]
        self.computed = end
        return PlannedRow(
            row=self.row,
            start_pos=start,
            token_ids=tuple(chunk),
            new_blocks=tuple(new_blocks),
            samples=samples,
        )

    @property
    def is_done(self) -> bool:
        return len(self.token_ids) == len(self.script.prompt_ids) + self.script.num_tokens


def run_script(
    config: RankConfig, collectives: Collectives, scripts: Sequence[ScriptedSequence]
) -> ScriptedResult:
    """Build the runner of `config` and run all sequences to their end."""
    runner = ModelRunner.build(config, collectives, lambda stage, done, total: None)
    runner.warmup()
    num_lanes = config.parallel.num_lanes
    first_row = None if num_lanes == 1 else config.rank * LIMITS.max_sequences
    recorder = RecordingDecoder(runner.decoder, collectives, runner.spec.vocab_size, first_row)
    runner.decoder = recorder
    result = ScriptedResult(token_ids=[[] for _ in scripts], logits=[[] for _ in scripts], experts_hit=[])
    waiting = dict(enumerate(scripts))
    live: dict[int, _Live] = {}
    free_blocks = [list(range(1, LIMITS.num_blocks)) for _ in range(num_lanes)]
    freed_rows: list[int] = []
    step = 0
    while waiting or live:
        joining = [index for index, script in waiting.items() if script.join_step <= step]
        taken = {sequence.row for sequence in live.values()}
        for index in joining:
            first = scripts[index].lane % num_lanes * LIMITS.max_sequences
            free = set(range(first, first + LIMITS.max_sequences)) - taken
            if free:
                taken.add(min(free))
                live[index] = _Live(min(free), waiting.pop(index))
        live = dict(sorted(live.items(), key=lambda item: item[1].row // LIMITS.max_sequences))
        new_rows = [
            NewRow(row=sequence.row, sampling=sequence.script.sampling)
            for sequence in live.values()
            if sequence.computed == 0
        ]
        rows = [
            sequence.plan(free_blocks[sequence.row // LIMITS.max_sequences], is_placeholder=step % 2 == 0)
            for sequence in live.values()
        ]
        step += 1
        plan = StepPlan(step=step, freed_rows=tuple(freed_rows), new_rows=tuple(new_rows), rows=tuple(rows))
        outcome = runner.launch(plan).result()
        result.experts_hit.append(outcome.experts_hit)
        sampled = iter(outcome.sampled_ids)
        freed_rows = []
        for (index, sequence), planned in zip(list(live.items()), rows, strict=True):
            if not planned.samples:
                continue
            sequence.token_ids.append(next(sampled))
            if sequence.row in recorder.last:
                result.logits[index].append(recorder.last[sequence.row])
            if sequence.is_done:
                result.token_ids[index] = sequence.token_ids
                free_blocks[sequence.row // LIMITS.max_sequences].extend(sequence.blocks)
                freed_rows.append(sequence.row)
                del live[index]
    assert all(sorted(blocks) == list(range(1, LIMITS.num_blocks)) for blocks in free_blocks)
    return result


def make_scripts(seed: int, vocab_size: int) -> list[ScriptedSequence]:
    """Five sequences of unequal lengths: two are chunked, two join late, into rows and blocks others left.

    Of four lanes the first has two sequences, the second is empty from the middle on, and the third at first.
    """
    generator = torch.Generator().manual_seed(seed)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())

    return [
        ScriptedSequence(prompt_ids=prompt(5), num_tokens=64),
        ScriptedSequence(prompt_ids=prompt(37), num_tokens=9, chunk_tokens=16, lane=1),
        ScriptedSequence(prompt_ids=prompt(1), num_tokens=20, join_step=2, lane=3),
        ScriptedSequence(prompt_ids=prompt(50), num_tokens=16, chunk_tokens=7, join_step=12, lane=2),
        ScriptedSequence(prompt_ids=prompt(24), num_tokens=12, join_step=30),
    ]


def make_script_configs(
    folder: Path,
    source: Path,
    *,
    tensor: int,
    expert: int,
    layout: str = "shared",
    kernels: str = "auto",
    threads: int = 1,
) -> list[RankConfig]:
    parallel = ParallelConfig(tensor=tensor, expert=expert, layout=layout)
    return [
        replace(
            make_rank_config(folder, rank=rank, parallel=parallel, source=str(source), limits=LIMITS),
            kernels=kernels,
            threads=threads,
        )
        for rank in range(parallel.num_ranks)
    ]


def follow_scripts(queue: Queue[Report], configs: list[RankConfig]) -> None:
    """One rank of several groups in turn: token ids and experts hit of each."""
    torch.set_num_threads(1)
    for config in configs:
        collectives = make_collectives(config)
        result = run_script(config, collectives, make_scripts(seed=0, vocab_size=500))
        queue.put((config.rank, config.group, (result.token_ids, result.experts_hit)))
        collectives.close()
