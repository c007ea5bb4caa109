"""What work costs this device, learned from its meter while it serves. Pure.

Each billed window says: so many joules for so many seconds of steps, FLOP and bytes. Recursive least squares
with forgetting fits three factors, none below zero, that correct what the coefficients shipped for the class
of device say. Time and bytes mostly grow together, so single factors are not to be believed; predictions and
shares are. What a window does not tell stays in the shipped proportions. Owned by the ledger of one group,
which is one model, device, precision and layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from replicas.energy.weights import DeviceCoefficients, StepWork

WINDOWS_TO_TRUST = 20
TRUSTED_ERROR = 0.25
_KEEP = 0.995
"""Of what was known, per window: 200 windows, 20 s of a GPU's counter."""
_KEEP_RATIO = 0.95
_PRIOR_WINDOWS = 0.5
_SWEEPS = 12
_SETTLED = 1e-6
_REFRESH_WINDOWS = 10
_LEAST_MJ = 20
_LEAST_FACTOR = 0.01
_VALUE, _ONE = 3, 4

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedFactors:
    """Factors on the shipped joules per second, FLOP and byte, from `num_windows` of the meter."""

    factors: Triple
    num_windows: int

    def __post_init__(self) -> None:
        if not all(math.isfinite(one) and one >= 0.0 for one in self.factors) or not sum(self.factors):
            raise ValueError(f"factors={self.factors}: three numbers from 0 up, not all 0")
        if self.num_windows < 0:
            raise ValueError(f"num_windows={self.num_windows}: 0 or more")


class CoefficientLearner:
    """Begins with `shipped` coefficients, or goes on from `known` factors of an earlier life.

    `ratio` is predicted by metered energy over the last windows, each predicted before it was learned from;
    None until a window was seen. `coefficients` are for sharing: the learned proportions once they can be
    trusted, on the shipped scale, so that the weight of a step never jumps.
    """

    def __init__(
        self,
        shipped: DeviceCoefficients,
        *,
        known: LearnedFactors | None = None,
        windows_to_trust: int = WINDOWS_TO_TRUST,
    ) -> None:
        self._shipped = shipped
        self._windows_to_trust = windows_to_trust
        self._units = _units(shipped)
        self._prior: Triple = (1.0, float(shipped.joules_per_flop > 0), float(shipped.joules_per_byte > 0))
        self._factors = known.factors if known else self._prior
        self._num_windows = known.num_windows if known else 0
        self._moments = np.zeros((_ONE + 1, _ONE + 1))
        """Faded sums of the products of every two of a window: its row, `_VALUE` and `_ONE`."""
        self._fresh: list[tuple[float, ...]] = []
        """Windows that are not in the moments yet."""
        self._recent = [0.0] * 4
        """Faded sums: joules predicted and metered, errors and windows."""
        if known is not None:
            self._anchor(known)
        self.coefficients = shipped

    @property
    def ratio(self) -> float | None:
        predicted, metered, _, _ = self._recent
        return predicted / metered if metered else None

    @property
    def is_trusted(self) -> bool:
        """Enough windows, and a mean error of the latest predictions that shares can live with."""
        _, _, error, count = self._recent
        return self._num_windows >= self._windows_to_trust and count > 0 and error / count <= TRUSTED_ERROR

    @property
    def known(self) -> LearnedFactors:
        """What a later life can go on from."""
        return LearnedFactors(factors=self._factors, num_windows=self._num_windows)

    def observe(self, work: StepWork, energy_mj: int) -> None:
        """A window billed `energy_mj` for `work`. Windows of a few millijoules are all rounding: skipped."""
        joules = (
            self._units[0] * work.seconds,
            self._units[1] * work.flops,
            self._units[2] * work.traffic_bytes,
        )
        expected_j = _dot(joules, self._prior)
        if energy_mj < _LEAST_MJ or expected_j <= 0.0:
            return
        row = (joules[0] / expected_j, joules[1] / expected_j, joules[2] / expected_j)
        value = energy_mj / 1e3 / expected_j
        self._note_prediction(row, value, energy_mj / 1e3)
        self._fresh.append((*row, value, 1.0))
        self._num_windows += 1
        if self._num_windows % _REFRESH_WINDOWS == 0:
            self._learn()
            self._solve()
            self._refresh()

    def _note_prediction(self, row: Triple, value: float, energy_j: float) -> None:
        predicted = _dot(row, self._factors)
        news = (energy_j * predicted / value, energy_j, abs(predicted - value) / value, 1.0)
        self._recent = [_KEEP_RATIO * one + new for one, new in zip(self._recent, news, strict=True)]

    def _learn(self) -> None:
        """Add the windows since the last time to the moments."""
        fresh = np.array(self._fresh)
        weights = _KEEP ** np.arange(len(fresh) - 1.0, -1.0, -1.0)
        self._moments = _KEEP ** len(fresh) * self._moments + (fresh.T * weights) @ fresh
        self._fresh.clear()

    def _solve(self) -> None:
        """The factors of the normal equations, none below zero, found from the last ones on."""
        moments = self._moments.tolist()
        scale = moments[_VALUE][_ONE] / moments[_ONE][_ONE]
        factors = list(self._factors)
        for _ in range(_SWEEPS):
            change = 0.0
            for i, row in enumerate(moments[:_VALUE]):
                own = row[i]
                pull = (
                    row[_VALUE]
                    - _dot(row, factors)
                    + own * factors[i]
                    + _PRIOR_WINDOWS * scale * self._prior[i]
                )
                new = max(0.0, pull / (own + _PRIOR_WINDOWS))
                change, factors[i] = change + abs(new - factors[i]), new
            if change < _SETTLED:
                break
        self._factors = (factors[0], factors[1], factors[2])

    def _refresh(self) -> None:
        """Weigh the next steps with what was learned, as much in all as the shipped coefficients would."""
        if not self.is_trusted:
            self.coefficients = self._shipped
            return
        mean_row = self._moments[_ONE].tolist()
        mean, whole = _dot(mean_row, self._factors), _dot(mean_row, self._prior)
        scale = whole / mean if mean > 0.0 else 1.0
        time, flop, octet = (scale * one for one in self._factors)
        self.coefficients = replace(
            self._shipped,
            static_w=self._units[0] * max(time, _LEAST_FACTOR),
            joules_per_flop=self._units[1] * flop,
            joules_per_byte=self._units[2] * octet,
        )

    def _anchor(self, known: LearnedFactors) -> None:
        """Let what was known weigh as much as some windows that say exactly that."""
        weight = min(known.num_windows, self._windows_to_trust) / 3.0
        for i, factor in enumerate(known.factors):
            self._moments[i, i] = weight
            self._moments[i, _VALUE] = weight * factor
        self._moments[_VALUE, _ONE] = weight * sum(known.factors)
        self._moments[_ONE, _ONE] = weight * (sum(self._prior) or 1.0)


def _units(shipped: DeviceCoefficients) -> Triple:
    """Joules per second, FLOP and byte where a factor is 1. Unknown ones: what time alone would make them."""
    return (
        shipped.static_w,
        shipped.joules_per_flop or shipped.static_w / shipped.flops_per_s,
        shipped.joules_per_byte or shipped.static_w / shipped.bytes_per_s,
    )


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return one[0] * other[0] + one[1] * other[1] + one[2] * other[2]
