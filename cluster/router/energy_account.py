"""The joules of one request, from the first provisional figure to the final one.

Millijoules as the replica's ledger closed them; the division into joules happens at the edge (`wire.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnergy:
    """One request's share of the metered energy; `static_mj` and `wasted_mj` are parts of the total."""

    prefill_mj: int
    decode_mj: int
    static_mj: int
    wasted_mj: int
    source: str
    method: str
    window_ms: float
    confidence_factor: float
    is_final: bool

    @property
    def total_mj(self) -> int:
        return self.prefill_mj + self.decode_mj


class EnergyAccount:
    """Mutable; owned by the event loop. Settled once: by final figures, or when none will come any more."""

    def __init__(self) -> None:
        self.energy: RequestEnergy | None = None
        """The newest figures; None: nothing is known."""
        self._settled = asyncio.Event()
        self._on_settled: list[Callable[[], None]] = []

    @property
    def is_settled(self) -> bool:
        return self._settled.is_set()

    @property
    def is_final(self) -> bool:
        return self.energy is not None and self.energy.is_final

    def update(self, energy: RequestEnergy) -> None:
        """Newer figures; after the final ones, nothing changes any more."""
        if self.is_settled:
            return
        self.energy = energy
        if energy.is_final:
            self.settle()

    def settle(self) -> None:
        """No more figures will come: the final ones are here, or their replica is gone."""
        if self.is_settled:
            return
        self._settled.set()
        callbacks, self._on_settled = self._on_settled, []
        for callback in callbacks:
            callback()

    def when_settled(self, callback: Callable[[], None]) -> None:
        """Call back once, at once if it is settled already."""
        if self.is_settled:
            callback()
        else:
            self._on_settled.append(callback)

    async def wait(self, timeout_s: float) -> None:
        """Return when it is settled, or after `timeout_s`."""
        if self.is_settled or timeout_s <= 0.0:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        except TimeoutError:
            return
