"""What requests owe: `accounts.py` in integer nanojoules, bills in integer millijoules. Pure.

Accounts are kept a million times finer than the meter counts, so equal work is equal money; the `Cashier`
rounds once, when a bill closes, and carries the remainder into the next bill. Nothing is ever lost:
`taken == billed + rounding + dust + open accounts`, as integers.
"""

from __future__ import annotations

import numpy as np

from replicas.energy.accounts import Account, Accounts, Held
from replicas.energy.claims import ENDED_NS, PREFILL, STATIC, WASTED, WEIGHT, Claims
from replicas.energy.host_share import HostShare
from replicas.energy.meter import CONFIDENCE_FACTORS, Source
from replicas.energy.payers import NJ_PER_MJ, Payers
from replicas.energy.window import Window
from replicas.record import record

METHOD = "step-ledger/2"
_LEAST_COVERAGE = 1e-3
_MOST_OPEN_NJ = 2**62


@record
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


def bill_of(
    account: Account,
    held: Held,
    accounts: Accounts,
    *,
    total_mj: int,
    source: Source,
    final: bool,
    open_prefill_nj: float = 0.0,
    open_decode_nj: float = 0.0,
    host_mj: int | None = None,
) -> RequestJoules:
    """A bill of `total_mj`, split as what its account held (and what is estimated to be open) is.

    `source` is said of an account that no billed window saw.
    """
    prefill_nj, decode_nj = held.prefill_nj + open_prefill_nj, held.decode_nj + open_decode_nj
    prefill_mj = round(total_mj * (prefill_nj / (prefill_nj + decode_nj))) if decode_nj else total_mj
    scale = total_mj / held.total_nj if held.total_nj else 0.0
    source = accounts.source(account) or source
    coverage = held.coverage if final else 1.0
    return RequestJoules(
        request_id=account.request_id,
        prefill_mj=prefill_mj,
        decode_mj=total_mj - prefill_mj,
        static_mj=min(total_mj, round(held.static_nj * scale)),
        wasted_mj=min(total_mj, round(held.wasted_nj * scale)),
        source=source,
        method=METHOD,
        window_ms=accounts.median_width_ns(account) / 1e6,
        confidence_factor=CONFIDENCE_FACTORS[source] / max(coverage, _LEAST_COVERAGE),
        final=final,
        host_mj=host_mj,
    )


def nothing_owed(request_id: int, *, source: Source) -> RequestJoules:
    """The bill of a request that was refused before any step could see it: a known 0."""
    return RequestJoules(
        request_id=request_id,
        prefill_mj=0,
        decode_mj=0,
        static_mj=0,
        wasted_mj=0,
        source=source,
        method=METHOD,
        window_ms=0.0,
        confidence_factor=CONFIDENCE_FACTORS[source],
        final=True,
        host_mj=0,
    )


class Cashier:
    """Takes whole millijoules in, hands whole millijoules out, and owns every remainder between."""

    def __init__(self, *, most_payers: int) -> None:
        self.payers = Payers(most=most_payers)
        self.accounts = Accounts()
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

    def has_room(self, busy_mj: int) -> bool:
        """Whether open accounts could hold a window's millijoules too: together a megawatt hour."""
        return self.open_nj + busy_mj * NJ_PER_MJ < _MOST_OPEN_NJ

    def take(self, window: Window, *, busy_mj: int, static_nj: int, claims: Claims) -> None:
        """Share `busy_mj` of a window among the accounts of `claims`; `static_nj` of it is static."""
        self.taken_mj += busy_mj
        pool_nj = busy_mj * NJ_PER_MJ + self._dust_nj
        weight, static_weight = claims.table[: STATIC + 1].sum(axis=1).tolist()
        assert weight > 0.0, "busy energy without anybody to bill"
        price = max(pool_nj, 0) / weight
        static_price = min(static_nj, max(pool_nj, 0)) / static_weight if static_weight else 0.0
        prices = np.array([[price], [static_price], [price], [price], [1.0]])
        given = (claims.table[:ENDED_NS] * prices).astype(np.int64)
        total = given[WEIGHT]
        np.minimum(given[STATIC : WASTED + 1], total, out=given[STATIC : WASTED + 1])
        given_nj, all_static_nj, prefill_nj, wasted_nj, _ = given.sum(axis=1).tolist()
        host_nj = self.host.take(window, busy_mj=busy_mj, device_nj=total)
        total -= given[PREFILL]  # The decode column from here on, as accounts hold it.
        rows = claims.table[WEIGHT].nonzero()[0]
        self.accounts.add_window(window, rows=rows, given=given, host_nj=host_nj)
        prefill_mj = self._note_prefill(prefill_nj, busy_mj)
        self.payers.take(
            prefill_nj=self.accounts.by_payer(given[PREFILL], prefill_nj),
            decode_nj=self.accounts.by_payer(total, given_nj - prefill_nj),
            prefill_mj=prefill_mj,
            decode_mj=busy_mj - prefill_mj,
        )
        self.static_nj += all_static_nj
        self.wasted_nj += wasted_nj
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

    def bill_mj(self, held: Held) -> int:
        """Close an account: its total, at most 1 mJ off, with the remainder carried to the next bill."""
        exact_nj = held.total_nj + self._rounding_nj
        total_mj = (exact_nj + NJ_PER_MJ // 2) // NJ_PER_MJ
        self._rounding_nj = exact_nj - total_mj * NJ_PER_MJ
        self.open_nj -= held.total_nj
        self.billed_mj += total_mj
        return total_mj

    def check(self) -> None:
        """Joules in equal joules out."""
        kept_nj = self._rounding_nj + self._dust_nj + self.open_nj
        assert self.taken_mj * NJ_PER_MJ == self.billed_mj * NJ_PER_MJ + kept_nj
        assert self.open_nj >= 0
        self.host.check()
