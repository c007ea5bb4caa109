"""The accounts of open requests: a row of integers each, so that a window is added to all of them at once.

Mutated by the ledger only: it opens and closes accounts, the cashier adds what windows gave. Nanojoules and
nanoseconds are 64-bit integers; the cashier keeps what all accounts hold together below that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from replicas.energy.meter import Source
from replicas.energy.weights import Integers
from replicas.energy.window import Window

_WIDTHS_KEPT = 64
_FIRST_ROWS = 64
_SOURCES = tuple(Source)
_RANK = {source: rank for rank, source in enumerate(_SOURCES)}


class Held(NamedTuple):
    """What one account holds. `static_nj` and `wasted_nj` are parts of the total, `host_nj` is beside it.

    `step_ns` is how long its steps in closed windows ran; `covered_ns` the part in billed ones.
    """

    decode_nj: int = 0
    static_nj: int = 0
    prefill_nj: int = 0
    wasted_nj: int = 0
    covered_ns: int = 0
    host_nj: int = 0
    step_ns: int = 0

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


_HOST_NJ = Held._fields.index("host_nj")
_STEP_NS = Held._fields.index("step_ns")


@dataclass(slots=True)
class Account:
    """One open request. Times are monotonic ns.

    `first_ns` is the start of its first step; None: none yet. `last_ns`, once it has ended: no step of it
    runs later. `row` is its place in every column until it closes.
    """

    request_id: int
    row: int
    first_ns: int | None = None
    last_ns: int = 0


class Accounts:
    """Rows of open requests; closed ones are taken again, and the table grows with the most ever open."""

    def __init__(self) -> None:
        self._held = np.zeros((len(Held._fields), 0), dtype=np.int64)
        self._widths_ns = np.zeros((0, _WIDTHS_KEPT), dtype=np.int64)
        self._num_widths = np.zeros(0, dtype=np.intp)
        self._rank = np.zeros(0, dtype=np.intp)
        self._payer = np.zeros(0, dtype=np.intp)
        self._payers: dict[str, int] = {}
        self._free: list[int] = []

    def open(self, request_id: int, payer: str) -> Account:
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._payer[row] = self._payers.setdefault(payer, len(self._payers))
        return Account(request_id, row)

    def close(self, account: Account) -> None:
        """Its row is another's from now on."""
        row = account.row
        self._held[:, row] = 0
        self._num_widths[row] = 0
        self._rank[row] = -1
        self._free.append(row)

    def held(self, account: Account) -> Held:
        return Held(*self._held[:, account.row].tolist())

    def median_width_ns(self, account: Account) -> int:
        """Of its last billed windows; 0 if there was none."""
        widths_ns = self._widths_ns[account.row, : self._num_widths[account.row]]
        return sorted(widths_ns.tolist())[len(widths_ns) // 2] if len(widths_ns) else 0

    def source(self, account: Account) -> Source | None:
        """The worst of its billed windows; None if there was none."""
        rank = int(self._rank[account.row])
        return _SOURCES[rank] if rank >= 0 else None

    def by_payer(self, amounts: Integers, total: int) -> dict[str, int]:
        """Sums over the rows of each payer, of amounts that add up to `total`."""
        if len(self._payers) == 1:
            return dict.fromkeys(self._payers, total)
        sums = np.zeros(len(self._payers), dtype=np.int64)
        np.add.at(sums, self._payer[: len(amounts)], amounts)
        return dict(zip(self._payers, sums.tolist(), strict=True))

    def add_steps(self, ended_ns: Integers) -> None:
        """A window closed in which so much step time ended, by row."""
        self._held[_STEP_NS, : len(ended_ns)] += ended_ns

    def add_missed(self, rows: Integers, duration_ns: int) -> None:
        """A step of these accounts that no closed window saw."""
        np.add.at(self._held[_STEP_NS], rows, duration_ns)

    def add_window(
        self, window: Window, *, rows: Integers, given: Integers, host_nj: Integers | None
    ) -> None:
        """A billed window saw steps of `rows`. `given`: the first columns of `Held`, from row 0 on."""
        num_given = given.shape[1]
        self._held[:_HOST_NJ, :num_given] += given
        if host_nj is not None:
            self._held[_HOST_NJ, :num_given] += host_nj
        num_widths = self._num_widths[rows]
        self._widths_ns[rows, num_widths % _WIDTHS_KEPT] = window.width_ns
        self._num_widths[rows] = num_widths + 1
        self._rank[rows] = np.maximum(self._rank[rows], _RANK[window.source])

    def _grow(self) -> None:
        num_old = len(self._rank)
        num_new = max(num_old, _FIRST_ROWS)
        self._held = np.pad(self._held, ((0, 0), (0, num_new)))
        self._widths_ns = np.pad(self._widths_ns, ((0, num_new), (0, 0)))
        self._num_widths = np.pad(self._num_widths, (0, num_new))
        self._rank = np.pad(self._rank, (0, num_new), constant_values=-1)
        self._payer = np.pad(self._payer, (0, num_new))
        self._free += range(num_old + num_new - 1, num_old - 1, -1)
