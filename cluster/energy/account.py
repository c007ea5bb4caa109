"""The joules of one request, from the first provisional figure to the final one.

Millijoules as the replica's ledger closed them; the division into joules happens at the edge (`wire.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

HOST_SOURCE = "shared"
"""Of the joules of a host: its meter counts all that runs there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnergy:
    """One request's share of the metered energy; `static_mj` and `wasted_mj` are parts of the total.

    `host_mj` is beside the total: its share of the hosts around the devices; None: unknown.
    """

    prefill_mj: int
    decode_mj: int
    static_mj: int
    wasted_mj: int
    source: str
    method: str
    window_ms: float
    confidence_factor: float
    is_final: bool
    host_mj: int | None = None

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
        self._on_change: list[Callable[[], None]] = []

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
        for callback in self._on_change:
            callback()

    def settle(self) -> None:
        """No more figures will come: the final ones are here, or their replica is gone."""
        if self.is_settled:
            return
        self._settled.set()
        callbacks, self._on_settled = self._on_settled, []
        for callback in callbacks:
            callback()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back at every newer figure, as long as there are any."""
        self._on_change.append(callback)

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


def joined(attempts: Sequence[EnergyAccount], *, repeated: Sequence[bool]) -> EnergyAccount:
    """The account of a choice from those of its attempts: what is known of any is a lower bound."""
    return _followed(attempts, partial(add_up, repeated=repeated))


def summed(choices: Sequence[EnergyAccount]) -> EnergyAccount:
    """The account of a request from those of its choices: unknown until all of them are known."""

    def add_up_all(energies: Sequence[RequestEnergy | None]) -> RequestEnergy | None:
        return None if None in energies else add_up(energies, repeated=[False] * len(energies))

    return _followed(choices, add_up_all)


def _followed(
    parts: Sequence[EnergyAccount],
    total: Callable[[Sequence[RequestEnergy | None]], RequestEnergy | None],
) -> EnergyAccount:
    """An account that follows its parts until all of them are settled."""
    if len(parts) == 1:
        return parts[0]
    whole = EnergyAccount()

    def follow() -> None:
        energy = total([part.energy for part in parts])
        if energy is not None:
            whole.update(energy)
        if all(part.is_settled for part in parts):
            whole.settle()

    follow()
    for part in parts:
        part.on_change(follow)
        part.when_settled(follow)
    return whole


def add_up(attempts: Sequence[RequestEnergy | None], *, repeated: Sequence[bool]) -> RequestEnergy | None:
    """The joules of a request from those of its attempts. None: nothing is known of any.

    Final only if all of them are known to the last: a lost replica's open bill makes the sum a lower bound.
    The prefill of a `repeated` attempt was done before, so it bought nothing. The sum is called by its least
    certain part.
    """
    known = [energy for energy in attempts if energy is not None]
    if not known:
        return None
    hosts_mj = [energy.host_mj for energy in known if energy.host_mj is not None]
    weakest = max(known, key=lambda energy: energy.confidence_factor)
    repeated_mj = sum(
        max(0, energy.prefill_mj - energy.wasted_mj)
        for energy, is_repeated in zip(attempts, repeated, strict=True)
        if energy is not None and is_repeated
    )
    return RequestEnergy(
        prefill_mj=sum(energy.prefill_mj for energy in known),
        decode_mj=sum(energy.decode_mj for energy in known),
        static_mj=sum(energy.static_mj for energy in known),
        wasted_mj=sum(energy.wasted_mj for energy in known) + repeated_mj,
        source=weakest.source,
        method=weakest.method,
        window_ms=max(energy.window_ms for energy in known),
        confidence_factor=weakest.confidence_factor,
        is_final=len(known) == len(attempts) and all(energy.is_final for energy in known),
        host_mj=sum(hosts_mj) if len(hosts_mj) == len(attempts) else None,
    )
