"""Readings of a host's energy agent, as one endless stream that survives the agent's restarts.

Called by the supervisor; the other end is `agent.py`. On the same host both clocks are one; the times of
another host's agent are told by ours.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc
from grpc import aio

from protos import wattline_energy_pb2 as wire
from protos.wattline_energy_pb2_grpc import EnergyAgentStub
from replicas.energy.ask_pipe import Asker
from replicas.energy.edge_pipe import read_edges
from replicas.energy.host_clock import HostClock
from replicas.energy.meter import Reading, Source
from replicas.errors import MeterUnavailable

if TYPE_CHECKING:
    from protos.wattline_energy_pb2_grpc import EnergyAgentAsyncStub

_LOG = logging.getLogger(__name__)
_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0
_FIRST_QUESTIONS = 5
_QUESTION_PERIOD_S = 10.0
_QUESTION_TIMEOUT_S = 5.0
_GIVE_UP = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


async def watch_readings(
    address: str,
    *,
    group: str,
    gpu_uuids: Sequence[str] = (),
    pids: Sequence[int] = (),
    meter: str = "auto",
    is_far: bool = False,
    asker: Asker | None = None,
    on_metrics_address: Callable[[str], None] = lambda _: None,
    on_state: Callable[[str], None] = lambda _: None,
) -> AsyncGenerator[Reading, None]:
    """Yield the edges of a group's meter until the caller stops iterating (close it: `aclosing`).

    `address` is a gRPC target, `unix:/path` or `host:port`. A lost agent is dialled again, first after 50 ms,
    then doubling up to 2 s; the first reading after that has `gap` set, and `energy_mj` goes on from where it
    was. Raises MeterUnavailable, with the agent's own words, when it refuses the watch.

    `is_far`: it is another host's agent, whose clock is asked for at each dial and every 10 s.
    `asker`: tells an agent of this host when edges are needed; without it they come at a fixed pace.
    `on_metrics_address` hears where the agent shows its /metrics, again after each dial, and `on_state` the
    meter's state, when its reads begin or cease to hang.
    """
    is_local = address.startswith("unix:")
    request = wire.WatchEnergyRequest(
        group=group,
        gpu_uuids=gpu_uuids,
        pids=pids,
        meter=meter,
        wants_pipe=is_local,
        can_ask=is_local and asker is not None,
    )

    ears = _Ears(asker=asker, on_metrics_address=on_metrics_address, on_state=on_state)
    splice = _Splice()
    delay_s = _FIRST_DELAY_S
    while True:
        async with aio.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
            try:
                stub = EnergyAgentStub(channel)
                watch = _far_edges(stub, request, ears) if is_far else _edges(stub.Watch(request), ears)
                async with aclosing(watch) as edges:
                    async for batch in edges:
                        delay_s = _FIRST_DELAY_S
                        for reading in batch:
                            yield splice.join(reading)
            except OSError as error:
                _LOG.warning("energy_watch.no_pipe", extra={"address": address, "error": str(error)})
                request.wants_pipe = request.can_ask = False
            except aio.AioRpcError as error:
                if error.code() in _GIVE_UP:
                    raise MeterUnavailable(f"energy agent at {address}: {error.details()}") from error
                _LOG.warning(
                    "energy_watch.lost",
                    extra={"address": address, "status": error.code().name, "group": group},
                )
        splice.cut()
        await asyncio.sleep(delay_s)
        delay_s = min(2 * delay_s, _LONGEST_DELAY_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ears:
    """Who hears what a message says beside readings."""

    asker: Asker | None
    on_metrics_address: Callable[[str], None]
    on_state: Callable[[str], None]

    def hear(self, message: wire.EnergyReadings) -> None:
        """OSError where a pipe cannot be opened."""
        if message.metrics_address:
            self.on_metrics_address(message.metrics_address)
        if message.asks and self.asker is not None:
            self.asker.open(message.asks)
        if message.state:
            self.on_state(message.state)


async def _edges(
    call: aio.UnaryStreamCall[wire.WatchEnergyRequest, wire.EnergyReadings],
    ears: _Ears,
) -> AsyncGenerator[list[Reading], None]:
    """The edges of one watch: those of the pipe that its first message names, else those of its messages."""
    while isinstance(message := await call.read(), wire.EnergyReadings):
        ears.hear(message)
        if not message.pipe:
            yield [_reading(one) for one in message.readings]
            continue
        ended = asyncio.ensure_future(_follow(call, ears))
        async with aclosing(read_edges(message.pipe, until=ended)) as batches:
            async for batch in batches:
                yield batch
        await ended
        return


async def _far_edges(
    stub: EnergyAgentAsyncStub, request: wire.WatchEnergyRequest, ears: _Ears
) -> AsyncGenerator[list[Reading], None]:
    """The edges of another host, told by our clock."""
    clock = HostClock()
    for _ in range(_FIRST_QUESTIONS):
        await _ask(stub, clock)
    asking = asyncio.create_task(_keep_asking(stub, clock))
    try:
        async with aclosing(_edges(stub.Watch(request), ears)) as batches:
            async for batch in batches:
                yield [replace(reading, t_ns=clock.to_ours(reading.t_ns)) for reading in batch]
    finally:
        asking.cancel()


async def _keep_asking(stub: EnergyAgentAsyncStub, clock: HostClock) -> None:
    """An answer that does not come is not missed: the watch itself ends with the connection."""
    while True:
        await asyncio.sleep(_QUESTION_PERIOD_S)
        with suppress(aio.AioRpcError):
            await _ask(stub, clock)


async def _ask(stub: EnergyAgentAsyncStub, clock: HostClock) -> None:
    asked_ns = time.monotonic_ns()
    answer = await stub.ReadClock(wire.ReadClockRequest(), timeout=_QUESTION_TIMEOUT_S)
    clock.note(asked_ns=asked_ns, theirs_ns=answer.t_ns, answered_ns=time.monotonic_ns())


async def _follow(
    call: aio.UnaryStreamCall[wire.WatchEnergyRequest, wire.EnergyReadings],
    ears: _Ears,
) -> None:
    """Until the watch ends."""
    while isinstance(message := await call.read(), wire.EnergyReadings):
        ears.hear(message)


class _Splice:
    """Joins the counts of successive watches, wherever each starts, into one from 0 on that never falls."""

    def __init__(self) -> None:
        self._last: Reading | None = None
        self._base_mj = 0
        self._base_static_mj = 0
        self._is_cut = True

    def cut(self) -> None:
        self._is_cut = True

    def join(self, reading: Reading) -> Reading:
        last = self._last
        if self._is_cut:
            self._base_mj = (last.energy_mj if last else 0) - reading.energy_mj
            self._base_static_mj = ((last.static_mj if last else 0) or 0) - (reading.static_mj or 0)
        static_mj = None if reading.static_mj is None else reading.static_mj + self._base_static_mj
        joined = replace(
            reading,
            energy_mj=reading.energy_mj + self._base_mj,
            static_mj=static_mj,
            gap=last is not None and (reading.gap or self._is_cut),
        )
        self._is_cut = False
        self._last = joined
        return joined


def _reading(message: wire.EnergyReading) -> Reading:
    return Reading(
        t_ns=message.t_ns,
        energy_mj=message.energy_mj,
        source=Source(message.source),
        static_mj=message.static_mj if message.HasField("static_mj") else None,
        host_mj=message.host_mj if message.HasField("host_mj") else None,
        gap=message.gap,
    )
