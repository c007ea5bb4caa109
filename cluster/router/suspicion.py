"""Which request a replica died of: who was there at a death, and who is let on together afterwards. Pure.

A replica that dies takes a batch of streams with it, and one of them may be the cause. Those that were
giving tokens go on at once, as witnesses. One that had given none yet, or hardly any, is a suspect: it goes
on where no other stream has to prove itself, and the next one follows when it has given a few tokens. So a
second death has one suspect, which is refused from then on, and the others live.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

from cluster.request.failover import LossReason

PROOF_TOKENS = 4
"""Given by one replica they prove a request harmless so far: more than a step or two that is still under way
when an engine fails."""


class Trial(Protocol):
    """What one replica did for a request, as far as that says who is to blame. `is_over`: it is gone."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def is_over(self) -> bool: ...


class Standing(Enum):
    """What is thought of a stream that is to go on elsewhere."""

    CLEAR = auto()
    """No replica died under it since it last proved itself."""
    WITNESS = auto()
    """It was giving tokens when its replica died."""
    SUSPECT = auto()
    """Its replica died before it had given a few."""


def standing_of(trials: Sequence[Trial], losses: Sequence[LossReason]) -> Standing:
    """Of a stream that lost these replicas one after another; `trials` are parallel to `losses`."""
    for trial, loss in zip(reversed(trials), reversed(losses), strict=True):
        is_proven = trial.num_tokens >= PROOF_TOKENS
        if loss.is_kill:
            return Standing.WITNESS if is_proven else Standing.SUSPECT
        if is_proven:
            break
    return Standing.CLEAR


class Probation:
    """The streams that came to one replica after a death and have yet to prove themselves. Mutable."""

    def __init__(self) -> None:
        self._on_trial: list[tuple[Trial, Standing]] = []
        self._is_closed = False
        self._culprit: Trial | None = None

    def admits(self, standing: Standing) -> bool:
        """Whether one of this standing may come now: a suspect to nobody, nobody to a suspect."""
        if standing is Standing.CLEAR:
            return True
        open_trials = self._open()
        return not open_trials or (
            standing is Standing.WITNESS and all(one is Standing.WITNESS for _, one in open_trials)
        )

    def join(self, trial: Trial, standing: Standing) -> None:
        if standing is not Standing.CLEAR:
            self._on_trial = [*self._open(), (trial, standing)]

    def is_culprit(self, trial: Trial) -> bool:
        """The replica died: whether of this one. The first to ask settles it for all, before they move on."""
        if not self._is_closed:
            self._is_closed = True
            match self._open():
                case [(only, _)]:
                    self._culprit = only
        return trial is self._culprit

    def _open(self) -> list[tuple[Trial, Standing]]:
        return [
            (trial, standing)
            for trial, standing in self._on_trial
            if trial.num_tokens < PROOF_TOKENS and not trial.is_over
        ]
