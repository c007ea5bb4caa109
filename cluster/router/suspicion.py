"""Which request a replica died of: who was there at each death, and who is let on together afterwards. Pure.

A replica that dies takes a batch of streams with it, and any of them may be the cause. It is found as a bad
fuse is: they go on one at a time, each where no other has to prove itself, and the next one follows when it
has given a few tokens, which brings it past the place where the replica died. So a second death has one
suspect, which is refused from then on, and the others live.

Most deaths are nobody's fault. The more have proven themselves on a replica, the less the rest are suspected,
and the more of them go together: the turns that a crowd takes grow with its logarithm. Where a replica dies
of several at once, nobody is blamed yet; each has two deaths against it then, and goes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cluster.request.failover import LossReason
from replicas.supervisor.in_flight import PROOF_TOKENS

PROOFS_PER_PLACE = 4
"""So many that proved themselves make room for one more at a time; the first eight go alone."""


class Trial(Protocol):
    """What one replica did for a request, as far as that says who is to blame. `is_over`: it is gone."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def is_over(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is held against a stream: the deaths that it was there at and has not outlived.

    It has outlived them when a replica gives `outlives_tokens`: as many as the one that died, and a few more.
    Until then it may be what does harm after so many. `death`: the replica that died last; empty: not known.
    """

    num_deaths: int = 0
    outlives_tokens: int = PROOF_TOKENS
    death: str = ""

    def after(self, trial: Trial, loss: LossReason, *, replica: str) -> Standing:
        """Once it lost the replica of `trial`."""
        has_outlived = trial.num_tokens >= self.outlives_tokens
        if not loss.is_kill:
            return CLEAR if has_outlived else self
        return Standing(
            num_deaths=1 if has_outlived else self.num_deaths + 1,
            outlives_tokens=trial.num_tokens + PROOF_TOKENS,
            death=replica,
        )


CLEAR = Standing()


class Probation:
    """The suspects that came to one replica, as far as they have not outlived what is held against them.

    Mutable. `open` have yet to prove themselves, `proven` have.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Trial, Standing]] = []
        self._proven: list[tuple[Trial, Standing]] = []
        self._death = ""
        self._num_proofs = 0
        """Of suspects of that death: another one may have another cause."""
        self._is_closed = False
        self._culprit: Trial | None = None

    def admits(self, standing: Standing) -> bool:
        """Whether one of this standing may come now. Who has two deaths against it goes alone."""
        if not standing.num_deaths:
            return True
        self._sweep()
        if not self._open:
            return True
        most_deaths = max(standing.num_deaths, *(one.num_deaths for _, one in self._open))
        num_proofs = self._num_proofs if standing.death == self._death else 0
        return most_deaths == 1 and len(self._open) < num_proofs // PROOFS_PER_PLACE

    def join(self, trial: Trial, standing: Standing) -> None:
        if not standing.num_deaths:
            return
        self._sweep()
        self._forget()
        if standing.death != self._death:
            self._death, self._num_proofs = standing.death, 0
        self._open.append((trial, standing))

    def is_culprit(self, trial: Trial, *, num_unproven: int = 0) -> bool:
        """The replica died: whether of this one. The first to ask settles it for all, before they move on.

        It is the only one there that has to prove itself; or where all have, the only one that did not
        outlive the death before this one. `num_unproven`: how many had to in all, as the replica says; where
        others came by another router, none is blamed, unless it has two deaths against it.
        """
        if not self._is_closed:
            self._is_closed = True
            self._sweep()
            self._forget()
            match self._open or self._proven:
                case [(only, standing)] if num_unproven <= len(self._open) or standing.num_deaths > 1:
                    self._culprit = only
        return trial is self._culprit

    def _sweep(self) -> None:
        """Who has proven itself, or is gone, makes room."""
        proven = [suspect for suspect in self._open if suspect[0].num_tokens >= PROOF_TOKENS]
        self._proven += proven
        self._num_proofs += sum(standing.death == self._death for _, standing in proven)
        self._open = [
            (trial, standing)
            for trial, standing in self._open
            if trial.num_tokens < PROOF_TOKENS and not trial.is_over
        ]

    def _forget(self) -> None:
        """Who has outlived what was held against it, or is gone, is no suspect any more."""
        self._proven = [
            (trial, standing)
            for trial, standing in self._proven
            if trial.num_tokens < standing.outlives_tokens and not trial.is_over
        ]
