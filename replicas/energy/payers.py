"""What each payer's requests took of the meter, in whole millijoules that add up and never fall. Pure.

A payer is a name that requests carry, as a tenant's. The cashier says how much each was given, in nanojoules;
each window's millijoules go to whom most is owed, and what is left of a millijoule is owed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

NJ_PER_MJ = 1_000_000
OTHER = "other"
"""The payers beyond the bound, together."""


class PayerSums(NamedTuple):
    """Millijoules of one payer's requests."""

    prefill_mj: int = 0
    decode_mj: int = 0

    def plus(self, other: PayerSums, *, sign: int) -> PayerSums:
        return PayerSums(self.prefill_mj + sign * other.prefill_mj, self.decode_mj + sign * other.decode_mj)


class Payers:
    """Sums over payers are those of all requests. At most `most` have a name of their own, the first ones."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._prefill = _Column()
        self._decode = _Column()

    @property
    def sums(self) -> dict[str, PayerSums]:
        decode_mj = self._decode.handed_mj
        return {name: PayerSums(mj, decode_mj[name]) for name, mj in self._prefill.handed_mj.items()}

    def known(self, payer: str) -> str:
        """The name it goes by from now on."""
        names = self._prefill.handed_mj
        if payer in names:
            return payer
        name = payer if len(names) < self._most else OTHER
        for column in (self._prefill, self._decode):
            column.handed_mj.setdefault(name, 0)
            column.owed_nj.setdefault(name, 0)
        return name

    def take(
        self, *, prefill_nj: Mapping[str, int], decode_nj: Mapping[str, int], prefill_mj: int, decode_mj: int
    ) -> None:
        """A window: prefill and decode by known payer, and the whole millijoules of all of them."""
        self._prefill.owe(prefill_nj)
        self._decode.owe(decode_nj)
        self._prefill.hand_out(prefill_mj)
        self._decode.hand_out(decode_mj)


class _Column:
    """Of prefill or decode. What is owed may be below nothing, by the millijoule that was rounded up."""

    def __init__(self) -> None:
        self.owed_nj: dict[str, int] = {}
        self.handed_mj: dict[str, int] = {}

    def owe(self, given_nj: Mapping[str, int]) -> None:
        for payer, nj in given_nj.items():
            self.owed_nj[payer] += nj

    def hand_out(self, amount_mj: int) -> None:
        for payer, owed_nj in self.owed_nj.items():
            whole_mj = min(amount_mj, max(0, owed_nj // NJ_PER_MJ))
            self._hand(payer, whole_mj)
            amount_mj -= whole_mj
        while amount_mj:
            self._hand(max(self.owed_nj, key=lambda payer: self.owed_nj[payer]), 1)
            amount_mj -= 1

    def _hand(self, payer: str, mj: int) -> None:
        self.handed_mj[payer] += mj
        self.owed_nj[payer] -= mj * NJ_PER_MJ
