"""Steps that were launched, and what is known of them: done already, or under way on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from replicas.plan import StepOutcome
from replicas.rank.batch import Draw, Target
from replicas.rank.transfer import Fetch


class Drawn(Protocol):
    """Whose tokens a step draws and scores: a batch, or its flat step."""

    @property
    def draws(self) -> tuple[Draw, ...]: ...

    @property
    def targets(self) -> tuple[Target, ...]: ...


class OutcomeReader(Protocol):
    """Who makes an outcome of the words a step leaves, once they are on the host."""

    def outcome(
        self,
        drawn: Drawn,
        words: list[int],
        logprobs: torch.Tensor | None,
        scores: torch.Tensor | None,
    ) -> StepOutcome:
        """`words`: one id per draw, then the experts hit."""


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that ran on the CPU, here and now."""

    outcome: StepOutcome

    def result(self) -> StepOutcome:
        return self.outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class EnqueuedStep:
    """A step on a device: ids, the experts hit, and logprobs, on their way to the host.

    `places` says where among the fetched words the id of each draw is; the last word is the experts hit.
    Logprobs and scores follow the words, if there are any.
    """

    reader: OutcomeReader
    drawn: Drawn
    has_logprobs: bool = False
    places: Sequence[int]
    fetch: Fetch

    def result(self) -> StepOutcome:
        fetched = self.fetch.wait()
        words = fetched[0].tolist()
        ids = [words[place] for place in self.places]
        logprobs = fetched[1] if self.has_logprobs else None
        scores = fetched[-1] if len(fetched) > 1 + self.has_logprobs else None
        return self.reader.outcome(self.drawn, [*ids, words[-1]], logprobs, scores)
