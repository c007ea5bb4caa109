"""The meters of a group over several hosts, as the one meter that its ledger divides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeAlias

from replicas.energy.meter import Reading
from replicas.energy.meter_sum import MeterSum
from replicas.request import StepRecord
from replicas.supervisor.feed import MeterFeed

MOST_WAITING = 1024
"""Edges that nobody took yet; a host with more of them waits."""

_Arrival: TypeAlias = "tuple[int, Reading] | Exception"


class SumFeed:
    """As long as one of them is not known, nothing is; where one is refused, all are."""

    def __init__(self, feeds: Sequence[MeterFeed]) -> None:
        self._feeds = feeds

    @property
    def metrics_addresses(self) -> tuple[str, ...]:
        return tuple(address for feed in self._feeds for address in feed.metrics_addresses)

    def note_step(self, record: StepRecord) -> None:
        for feed in self._feeds:
            feed.note_step(record)

    def want_edge(self) -> None:
        for feed in self._feeds:
            feed.want_edge()

    async def readings(self) -> AsyncGenerator[Reading, None]:
        arrivals: asyncio.Queue[_Arrival] = asyncio.Queue(MOST_WAITING)
        pumps = [asyncio.create_task(_pump(feed, index, arrivals)) for index, feed in enumerate(self._feeds)]
        meter_sum = MeterSum(len(self._feeds))
        try:
            while True:
                arrival = await arrivals.get()
                if isinstance(arrival, Exception):
                    raise arrival
                edge = meter_sum.add(*arrival)
                if edge is not None:
                    yield edge
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(feed: MeterFeed, index: int, arrivals: asyncio.Queue[_Arrival]) -> None:
    try:
        async with aclosing(feed.readings()) as readings:
            async for reading in readings:
                await arrivals.put((index, reading))
    except Exception as error:
        await arrivals.put(error)
