"""What one rank of the `dispatch` layout does of a step, and how all ranks learn what each of them sampled.

Every rank has a lane: rows `lane * max_sequences ...` of the plans, numbered from 0 within the rank. All
ranks read whole plans, so each knows without a word how many tokens and samples the others have. After
sampling they exchange their ids and scores, and all of them report the same outcome, as in the `shared`
layout. Shape letters: S sampled tokens, M those that ask for logprobs or known tokens that are scored, K as
in `logprobs.py`; of this lane before the exchange, of all lanes behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from replicas.parallel.collectives import Collectives
from replicas.plan import StepPlan
from replicas.rank.batch import Draw, Target
from replicas.rank.logprobs import asking_of, most_asked
from replicas.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStep:
    """One step as one rank sees it.

    `plan` holds its own rows, numbered from 0, maybe none; `num_tokens` those of every lane; `draws` what all
    lanes sample, in the order of the whole plan and with its row numbers, `targets` what all lanes score, of
    which lane n has `num_targets[n]`.
    """

    plan: StepPlan
    num_tokens: tuple[int, ...]
    draws: tuple[Draw, ...]
    targets: tuple[Target, ...]
    num_targets: tuple[int, ...]

    @property
    def most_logprobs(self) -> int:
        """The most alternatives that a draw of any lane asks for."""
        return most_asked(self.draws)

    @property
    def most_scores(self) -> int:
        """The most alternatives that a scored token of any lane asks for."""
        return most_asked(self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a step gave: ids [S], and [M, 1 + 2K] of draws that ask and of scored tokens, if any do."""

    ids_S: torch.Tensor
    logprobs_MK: torch.Tensor | None = None
    scores_MK: torch.Tensor | None = None


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
        targets, num_targets = self._targets(plan)
        return LaneStep(
            plan=self._own_part(plan),
            num_tokens=tuple(num_tokens),
            draws=tuple(draws),
            targets=targets,
            num_targets=num_targets,
        )

    def exchange(self, step: LaneStep, own: Sampled) -> Sampled:
        """What all lanes sampled and scored, parallel to `step.draws` and `step.targets`."""
        asking = [step.draws[index] for index in asking_of(step.draws)]
        return Sampled(
            ids_S=self._collectives.all_gather_rows(own.ids_S, self._per_lane(step.draws))
            if step.draws
            else own.ids_S,
            logprobs_MK=self._gather(own.logprobs_MK, self._per_lane(asking), most=step.most_logprobs),
            scores_MK=self._gather(own.scores_MK, step.num_targets, most=step.most_scores),
        )

    def _gather(self, own: torch.Tensor | None, counts: Sequence[int], *, most: int) -> torch.Tensor | None:
        """The rows of all lanes, of which each has as many as `counts` says."""
        if not any(counts):
            return None
        if own is None:
            own = torch.empty((0, 1 + 2 * most), dtype=torch.float32)
        return self._collectives.all_gather_rows(own, counts)

    def _per_lane(self, draws: Sequence[Draw]) -> list[int]:
        counts = [0] * self._collectives.size
        for draw in draws:
            counts[draw.row // self._max_sequences] += 1
        return counts

    def _targets(self, plan: StepPlan) -> tuple[tuple[Target, ...], tuple[int, ...]]:
        """The known tokens that all lanes score, and how many of them are each lane's."""
        rows = {row.row: row for row in plan.rows} if plan.scored else {}
        targets: list[Target] = []
        counts = [0] * self._collectives.size
        for scored in plan.scored:
            followers, sampling = scored.targets(rows[scored.row].token_ids), self._sampling[scored.row]
            targets += [Target(token_id=token_id, sampling=sampling) for token_id in followers]
            counts[scored.row // self._max_sequences] += len(followers)
        return tuple(targets), tuple(counts)

    def _own_part(self, plan: StepPlan) -> StepPlan:
        own, first = self.own_rows, self.own_rows.start
        return StepPlan(
            step=plan.step,
            freed_rows=tuple(row - first for row in plan.freed_rows if row in own),
            new_rows=tuple(replace(new, row=new.row - first) for new in plan.new_rows if new.row in own),
            rows=tuple(replace(row, row=row.row - first) for row in plan.rows if row.row in own),
            scored=tuple(replace(row, row=row.row - first) for row in plan.scored if row.row in own),
        )
