"""What requests owe: open accounts in integer nanojoules, bills in integer millijoules. Pure.

Accounts are kept a million times finer than the meter counts, so equal work is equal money; the `Cashier`
rounds once, when a bill closes, and carries the remainder into the next bill. Nothing is ever lost:
`taken == billed + rounding + dust + open accounts`, as integers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from replicas.energy.claims import Claims
from replicas.energy.host_share import HostShare
from replicas.energy.meter import CONFIDENCE_FACTORS, Source
from replicas.energy.payers import NJ_PER_MJ, Payers
from replicas.energy.window import Window

METHOD = "step-ledger/2"
_WIDTHS_KEPT = 64
_LEAST_COVERAGE = 1e-3
_RANK = {source: rank for rank, source in enumerate(Source)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestJoules:
    """Energy of one request. `static_mj` and `wasted_mj` are parts of `prefill_mj + decode_mj`.

    `window_ms` is the median width of the meter windows used; 0 when the request never ran. The truth lies
    within total / confidence_factor .. total * confidence_factor. Not `final`: some windows are estimated.
    `host_mj` is beside the total; None where the host is not metered.
    """

    request_id: int
    prefill_mj: int
    decode_mj: int
    static_mj: int
    wasted_mj: int
    source: Source
    method: str
    window_ms: float
    confidence_factor: float
    final: bool
    host_mj: int | None = None

    @property
    def total_mj(self) -> int:
        return self.prefill_mj + self.decode_mj


class Account:
    """Running sums of one request, mutated by the ledger and the cashier only. Times are monotonic ns.

    `first_ns` is the start of its first step; None: none yet. `last_ns`, once it has ended: no step of it
    runs later. `step_ns` is how long its steps in closed windows ran; `covered_ns` the part in billed ones.
    """

    __slots__ = (
        "covered_ns",
        "decode_nj",
        "first_ns",
        "host_nj",
        "last_ns",
        "payer",
        "prefill_nj",
        "request_id",
        "source",
        "static_nj",
        "step_ns",
        "wasted_nj",
        "widths_ns",
    )

    def __init__(self, request_id: int, payer: str) -> None:
        self.request_id = request_id
        self.payer = payer
        self.prefill_nj = 0
        self.decode_nj = 0
        self.static_nj = 0
        self.wasted_nj = 0
        self.host_nj = 0
        self.first_ns: int | None = None
        self.last_ns = 0
        self.step_ns = 0
        self.covered_ns = 0
        self.source: Source | None = None
        self.widths_ns: deque[int] = deque(maxlen=_WIDTHS_KEPT)

    @property
    def total_nj(self) -> int:
        return self.prefill_nj + self.decode_nj

    @property
    def is_measured(self) -> bool:
        """False when steps ran and no billed window saw any of them: its energy is unknown, not 0."""
        return self.covered_ns > 0 or self.step_ns == 0 or self.total_nj > 0

    @property
    def coverage(self) -> float:
        return min(1.0, self.covered_ns / self.step_ns) if self.step_ns else 1.0

    def note_window(
        self, window: Window, ran_ns: int, prefill_nj: int, decode_nj: int, static_nj: int, wasted_nj: int
    ) -> None:
        """A billed window saw `ran_ns` of this account's steps; of two sources the worse label stays."""
        self.prefill_nj += prefill_nj
        self.decode_nj += decode_nj
        self.static_nj += static_nj
        self.wasted_nj += wasted_nj
        self.covered_ns += ran_ns
        self.widths_ns.append(window.end_ns - window.start_ns)
        source = window.source
        if source is not self.source and (self.source is None or _RANK[source] > _RANK[self.source]):
            self.source = source

    def joules(
        self,
        *,
        total_mj: int,
        source: Source,
        final: bool,
        open_prefill_nj: float = 0.0,
        open_decode_nj: float = 0.0,
        coverage: float = 1.0,
        host_mj: int | None = None,
    ) -> RequestJoules:
        """A bill of `total_mj`, split as the account (and what is estimated to be open) is."""
        prefill_nj = self.prefill_nj + open_prefill_nj
        decode_nj = self.decode_nj + open_decode_nj
        prefill_mj = round(total_mj * (prefill_nj / (prefill_nj + decode_nj))) if decode_nj else total_mj
        scale = total_mj / self.total_nj if self.total_nj else 0.0
        source = self.source or source
        return RequestJoules(
            request_id=self.request_id,
            prefill_mj=prefill_mj,
            decode_mj=total_mj - prefill_mj,
            static_mj=min(total_mj, round(self.static_nj * scale)),
            wasted_mj=min(total_mj, round(self.wasted_nj * scale)),
            source=source,
            method=METHOD,
            window_ms=_median(self.widths_ns) / 1e6 if self.widths_ns else 0.0,
            confidence_factor=CONFIDENCE_FACTORS[source] / max(coverage, _LEAST_COVERAGE),
            final=final,
            host_mj=host_mj,
        )


class Cashier:
    """Takes whole millijoules in, hands whole millijoules out, and owns every remainder between."""

    def __init__(self, *, most_payers: int) -> None:
        self.payers = Payers(most=most_payers)
        self.host = HostShare()
        self.taken_mj = 0
        self.billed_mj = 0
        self.open_nj = 0
        self.prefill_mj = 0
        """The part of `taken_mj` that went to prefill; the rest is decode. Whole, and never falls."""
        self.static_nj = 0
        self.wasted_nj = 0
        self.nj_per_weight: float | None = None
        self._dust_nj = 0
        self._rounding_nj = 0
        self._prefill_carry_nj = 0

    def take(
        self, window: Window, *, busy_mj: int, static_nj: int, claims: Claims, accounts: Sequence[Account]
    ) -> None:
        """Share `busy_mj` of a window among `accounts`, those of `claims`; `static_nj` of it is static."""
        self.taken_mj += busy_mj
        pool_nj = busy_mj * NJ_PER_MJ + self._dust_nj
        weight, static_weight = float(claims.weight.sum()), float(claims.static.sum())
        assert weight > 0.0, "busy energy without anybody to bill"
        price = max(pool_nj, 0) / weight
        static_price = min(static_nj, max(pool_nj, 0)) / static_weight if static_weight else 0.0
        total = _whole(price * claims.weight)
        prefill = np.minimum(_whole(price * claims.prefill), total)
        static = np.minimum(_whole(static_price * claims.static), total)
        prefills_nj, decodes_nj = prefill.tolist(), (total - prefill).tolist()
        statics_nj, wastes_nj = static.tolist(), _whole(price * claims.wasted).tolist()
        columns = (claims.ran_ns, prefills_nj, decodes_nj, statics_nj, wastes_nj)
        for account, *row in zip(accounts, *columns, strict=True):
            account.note_window(window, *row)
        host_nj = self.host.take(window, busy_mj=busy_mj, device_nj=total)
        for account, nj in zip(accounts, host_nj, strict=False):
            account.host_nj += nj
        given_prefill_nj = sum(prefills_nj)
        given_nj = given_prefill_nj + sum(decodes_nj)
        prefill_mj = self._note_prefill(given_prefill_nj, busy_mj)
        self.payers.take(
            _by_payer(accounts, prefills_nj, decodes_nj),
            prefill_mj=prefill_mj,
            decode_mj=busy_mj - prefill_mj,
        )
        self.static_nj += sum(statics_nj)
        self.wasted_nj += sum(wastes_nj)
        self._dust_nj = pool_nj - given_nj
        self.open_nj += given_nj
        last = self.nj_per_weight
        self.nj_per_weight = price if last is None else last + 0.2 * (price - last)

    def _note_prefill(self, prefill_nj: int, busy_mj: int) -> int:
        """Split a window in whole millijoules; fractions are carried on, so neither part ever falls."""
        owed_nj = prefill_nj + self._prefill_carry_nj
        prefill_mj = min(busy_mj, owed_nj // NJ_PER_MJ)
        self.prefill_mj += prefill_mj
        self._prefill_carry_nj = owed_nj - prefill_mj * NJ_PER_MJ
        return prefill_mj

    def bill_mj(self, account: Account) -> int:
        """Close an account: its total, at most 1 mJ off, with the remainder carried to the next bill."""
        exact_nj = account.total_nj + self._rounding_nj
        total_mj = (exact_nj + NJ_PER_MJ // 2) // NJ_PER_MJ
        self._rounding_nj = exact_nj - total_mj * NJ_PER_MJ
        self.open_nj -= account.total_nj
        self.billed_mj += total_mj
        return total_mj

    def check(self) -> None:
        """Joules in equal joules out."""
        kept_nj = self._rounding_nj + self._dust_nj + self.open_nj
        assert self.taken_mj * NJ_PER_MJ == self.billed_mj * NJ_PER_MJ + kept_nj
        assert self.open_nj >= 0
        self.host.check()


def _by_payer(
    accounts: Sequence[Account], prefill_nj: Sequence[int], decode_nj: Sequence[int]
) -> dict[str, tuple[int, int]]:
    payers = {account.payer for account in accounts}
    if len(payers) == 1:
        return {payers.pop(): (sum(prefill_nj), sum(decode_nj))}
    sums: dict[str, tuple[int, int]] = dict.fromkeys(payers, (0, 0))
    for account, prefill, decode in zip(accounts, prefill_nj, decode_nj, strict=True):
        so_far = sums[account.payer]
        sums[account.payer] = (so_far[0] + prefill, so_far[1] + decode)
    return sums


def _median(values: Collection[int]) -> int:
    return sorted(values)[len(values) // 2]


def _whole(amounts: NDArray[np.float64]) -> NDArray[np.int64]:
    return amounts.astype(np.int64)
