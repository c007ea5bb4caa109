"""What one rank of the `dispatch` layout does of a step, and how all ranks learn what each of them sampled.

Every rank has a lane: rows `lane * max_sequences ...` of the plans, numbered from 0 within the rank. All
ranks read whole plans, so each knows without a word how many tokens and samples the others have. After
sampling they exchange their ids, and all of them report the same outcome, as in the `shared` layout. Shape
letters: S sampled tokens of this lane, A of all lanes, M and N those of them that ask for logprobs, K as in
`logprobs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from replicas.parallel.collectives import Collectives
from replicas.plan import StepPlan
from replicas.rank.batch import Draw
from replicas.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStep:
    """One step as one rank sees it.

    `plan` holds its own rows, numbered from 0, maybe none; `num_tokens` those of every lane; `draws` what all
    lanes sample, in the order of the whole plan and with its row numbers.
    """

    plan: StepPlan
    num_tokens: tuple[int, ...]
    draws: tuple[Draw, ...]

    @property
    def num_best(self) -> int | None:
        """The most alternatives that a draw of any lane asks for; None: no draw asks for logprobs."""
        asked = [draw.sampling.num_logprobs for draw in self.draws]
        return max((count for count in asked if count is not None), default=None)


class Lanes:
    """Owns the sampling parameters of the rows of all lanes; changed by plans alone."""

    def __init__(self, collectives: Collectives, *, max_sequences: int) -> None:
        self._collectives = collectives
        self._max_sequences = max_sequences
        self.count = collectives.size
        self._sampling: dict[int, SamplingParams] = {}
        first = collectives.rank * max_sequences
        self.own_rows = range(first, first + max_sequences)

    def split(self, plan: StepPlan) -> LaneStep:
        """This rank's part of a whole plan; takes note of the rows that begin and end."""
        for row in plan.freed_rows:
            del self._sampling[row]
        for new in plan.new_rows:
            self._sampling[new.row] = new.sampling
        num_tokens = [0] * self._collectives.size
        for planned in plan.rows:
            num_tokens[planned.row // self._max_sequences] += len(planned.token_ids)
        draws = [
            Draw(
                row=planned.row,
                sampling=self._sampling[planned.row],
                position=planned.start_pos + len(planned.token_ids),
            )
            for planned in plan.rows
            if planned.samples
        ]
        lanes = [draw.row // self._max_sequences for draw in draws]
        assert lanes == sorted(lanes), "a plan goes lane by lane"
        return LaneStep(plan=self._own_part(plan), num_tokens=tuple(num_tokens), draws=tuple(draws))

    def exchange(
        self, step: LaneStep, ids_S: torch.Tensor, logprobs_MK: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The ids [A] and logprobs [N, 1 + 2K] of all lanes, parallel to `step.draws`."""
        if not step.draws:
            return ids_S, None
        ids_A = self._collectives.all_gather_rows(ids_S, self._per_lane(step.draws))
        if step.num_best is None:
            return ids_A, None
        if logprobs_MK is None:
            logprobs_MK = torch.empty((0, 1 + 2 * step.num_best), dtype=torch.float32, device=ids_S.device)
        asking = [draw for draw in step.draws if draw.sampling.num_logprobs is not None]
        return ids_A, self._collectives.all_gather_rows(logprobs_MK, self._per_lane(asking))

    def _per_lane(self, draws: list[Draw] | tuple[Draw, ...]) -> list[int]:
        counts = [0] * self._collectives.size
        for draw in draws:
            counts[draw.row // self._max_sequences] += 1
        return counts

    def _own_part(self, plan: StepPlan) -> StepPlan:
        own, first = self.own_rows, self.own_rows.start
        return StepPlan(
            step=plan.step,
            freed_rows=tuple(row - first for row in plan.freed_rows if row in own),
            new_rows=tuple(replace(new, row=new.row - first) for new in plan.new_rows if new.row in own),
            rows=tuple(replace(row, row=row.row - first) for row in plan.rows if row.row in own),
        )
