"""The energy agent: the one process of a host that reads its meters, and serves the edges to whoever watches.

Started by the first supervisor of the host (`EnergyAgent`), or by hand: `python -m replicas.energy.agent`.
It never runs inside a rank. One meter is polled once, however many watch it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import grpc
from grpc import aio
from prometheus_client import CollectorRegistry

from protos import wattline_energy_pb2 as wire
from protos.wattline_energy_pb2_grpc import EnergyAgentServicer, add_EnergyAgentServicer_to_server
from replicas.config import MetricsAccess
from replicas.energy.agent_messages import key_of, meter_descriptions, reading_message
from replicas.energy.agent_metrics import MeterSeries
from replicas.energy.agent_options import agent_parser, metrics_access
from replicas.energy.aside_call import AsideCalls
from replicas.energy.ask_pipe import AskPipe
from replicas.energy.edge_pipe import EdgePipe
from replicas.energy.host_meter import HostMeter, open_host_meter
from replicas.energy.meter import Meter, MeterState, Reading, hold_the_same
from replicas.energy.open_meter import MeterSettings, open_meter
from replicas.energy.poll_thread import PollThread
from replicas.energy.polling import MeterPoller
from replicas.energy.rapl import POWERCAP_DIR
from replicas.energy.read_schedule import ReadSchedule
from replicas.energy.socket_path import check_socket_path
from replicas.energy.watch_key import WatchKey
from replicas.errors import MeterUnavailable
from replicas.metrics_page import MetricsPage
from replicas.strict_messages import add_strictly

_LOG = logging.getLogger(__name__)
_MAX_WATCHES = 256
_MAX_HUNG = 8
_STOP_GRACE_S = 0.1
_PIPE_INFIX = ".edges-"
_ASKS_SUFFIX = ".asks"
_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    # A watch that reads a pipe hears nothing on its stream, and asks every 20 s whether we are there. gRPC
    # takes more than two such questions in five minutes for an attack, unless told, and ends the watch.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
)


class EnergyAgent:
    """Serves `wattline.v1.EnergyAgent`. Lives in one event loop; every method is called from there.

    `exit_after_idle_s`: how long `serve_until_unused` goes on without any watch; None: for ever.
    """

    def __init__(
        self,
        *,
        poll_s: float = 0.05,
        cpu_static_w: float = 10.0,
        cpu_core_w: float = 8.0,
        clock: Callable[[], int] = time.monotonic_ns,
        exit_after_idle_s: float | None = 60.0,
        host_meter: str = "auto",
        powercap_dir: Path = POWERCAP_DIR,
    ) -> None:
        if not 0.001 <= poll_s <= 1.0:
            raise ValueError(f"poll_s={poll_s}: give 0.001 to 1.0 (a GPU counter moves every 0.1 s)")
        self.registry = CollectorRegistry()
        self.clock = clock
        self._exit_after_idle_s = exit_after_idle_s
        self._host: HostMeter | None = None
        self._open_host = partial(open_host_meter, host_meter, powercap_dir)
        self._opening: asyncio.Task[None] | None = None
        self._pollers: dict[WatchKey, MeterPoller] = {}
        self._making = asyncio.Lock()
        self._schedule = ReadSchedule(poll_s=poll_s, clock=clock)
        self._thread = PollThread(self._schedule)
        self._settings = MeterSettings(
            poll_ns=round(poll_s * 1e9), cpu_static_w=cpu_static_w, cpu_core_w=cpu_core_w, clock=clock
        )
        self._calls = AsideCalls()
        self._num_silent = 0
        self._series = MeterSeries(
            self._pollers.values, host=lambda: self._host, count_reads=lambda: self._thread.num_reads
        )
        self.registry.register(self._series)
        self._num_watches = self._num_pipes = 0
        self._page: MetricsPage | None = None
        self._server: aio.Server | None = None
        self._socket_paths: list[Path] = []
        self._used_ns = self._started_ns = clock()
        self._started_cpu_ns = time.process_time_ns()

    @property
    def cpu_share(self) -> float:
        """Part of one core this process has used since the agent was made: what measuring costs."""
        elapsed_ns = max(self.clock() - self._started_ns, 1)
        return (time.process_time_ns() - self._started_cpu_ns) / elapsed_ns

    async def start(self, *addresses: str) -> tuple[str, ...]:
        """Listen on `unix:/path` and `host:port` addresses; gives them back with port 0 filled in."""
        server = aio.server(options=_SERVER_OPTIONS)
        add_strictly(add_EnergyAgentServicer_to_server, _Servicer(self), server)
        bound = tuple(self._bind(server, address) for address in addresses)
        await server.start()
        self._server = server
        for path in self._socket_paths:
            path.chmod(0o600)
            for left_over in path.parent.glob(f"{path.name}{_PIPE_INFIX}*"):
                left_over.unlink(missing_ok=True)
        self._schedule.asks = self._make_asks()
        self._opening = asyncio.create_task(self._find_host())
        _LOG.info("energy_agent.started", extra={"addresses": bound})
        return bound

    @property
    def metrics_address(self) -> str:
        """Where /metrics is; empty: nowhere."""
        return self._page.address if self._page else ""

    def serve_metrics(self, access: MetricsAccess, *, port: int = 0) -> None:
        """Show /metrics there until `stop`. Without a place to listen it does its work all the same."""
        try:
            self._page = MetricsPage(self.registry, access, port=port)
        except OSError as error:
            _LOG.warning(
                "energy_agent.no_metrics", extra={"host": access.host, "port": port, "error": str(error)}
            )

    async def serve_until_unused(self) -> None:
        """Return, stopped, when nobody has watched for `exit_after_idle_s`."""
        while True:
            await asyncio.sleep(self._unused_left_s())
            if self._unused_left_s() <= 0.0:
                break
        await self.stop()

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        await server.stop(_STOP_GRACE_S)
        if self._opening is not None:
            self._opening.cancel()
        page, self._page = self._page, None
        if page is not None:
            await asyncio.to_thread(page.close)
        for poller in self._pollers.values():
            self._thread.end(poller)
        self._pollers.clear()
        await asyncio.to_thread(self._thread.close)
        for path in self._socket_paths:
            path.unlink(missing_ok=True)
        _LOG.info("energy_agent.stopped", extra={"cpu_share": round(self.cpu_share, 5)})

    def make_pipe(self) -> EdgePipe | None:
        """Beside the first socket; None where there is none, or no pipe can be made."""
        if not self._socket_paths:
            return None
        self._num_pipes += 1
        path = self._socket_paths[0]
        try:
            return EdgePipe(path.with_name(f"{path.name}{_PIPE_INFIX}{self._num_pipes}"))
        except OSError as error:
            _LOG.warning("energy_agent.no_pipe", extra={"error": str(error)})
            return None

    @property
    def asks_path(self) -> str:
        """The pipe where watchers say what they need; empty: there is none."""
        return "" if self._schedule.asks is None else str(self._schedule.asks.path)

    async def watch(
        self, key: WatchKey, group: str, pipe: EdgePipe | None = None, *, can_ask: bool = False
    ) -> AsyncGenerator[list[Reading] | MeterState, None]:
        """Edges of a meter, from now on, here or in `pipe`; its state, when its reads begin or cease to hang.

        `can_ask`: this watcher says when it needs edges; for one that cannot they come at a fixed pace.
        Raises MeterUnavailable before the first one.
        """
        async with self._making:
            poller = self._pollers.get(key)
            if poller is None:
                self._check_hung()
                meter = await self._calls.run(
                    lambda: open_meter(key, self._settings), drop=lambda late: late.close()
                )
                self._check_once(meter)
                poller = MeterPoller(meter, group=group)
                self._pollers[key] = poller
                if self._host is not None:
                    poller.sit_at(self._host)
                self._thread.add(poller)
                _LOG.info("energy_agent.meter_opened", extra={"group": group, "meter": type(meter).__name__})
            subscriber = poller.subscribe(pipe)
            self._count_watch(1, can_ask=can_ask)
        try:
            while True:
                yield await subscriber.take()
        finally:
            self._count_watch(-1, can_ask=can_ask)
            self._used_ns = self.clock()
            poller.unsubscribe(subscriber)
            if not poller.is_watched and self._pollers.get(key) is poller:
                del self._pollers[key]
                self._series.retire(poller)
                self._thread.end(poller)

    async def _find_host(self) -> None:
        """Its files may hang: then we go on without it, and take it when they answer after all."""
        try:
            self._sit_at(await self._calls.run(self._open_host, drop=self._sit_at))
        except MeterUnavailable as error:
            _LOG.warning("energy_agent.no_host_meter", extra={"error": str(error)})

    def _sit_at(self, host: HostMeter | None) -> None:
        if host is None:
            return
        if self._server is None:
            host.close()
            return
        self._host = self._thread.host = host
        for poller in self._pollers.values():
            poller.sit_at(host)

    def _count_watch(self, change: int, *, can_ask: bool) -> None:
        self._num_watches += change
        self._num_silent += 0 if can_ask else change
        self._schedule.pace.is_silent = self._num_silent > 0

    def _make_asks(self) -> AskPipe | None:
        """Beside the first socket; without it no watcher can ask, and edges come at a fixed pace."""
        for path in self._socket_paths[:1]:
            with suppress(OSError):
                return AskPipe(path.with_name(path.name + _ASKS_SUFFIX))
        return None

    def _check_hung(self) -> None:
        """Each read that hangs keeps a thread, also after its watch has ended."""
        if self._thread.num_hung >= _MAX_HUNG:
            raise MeterUnavailable(
                f"the reads of {self._thread.num_hung} meters of this host do not return, {_MAX_HUNG} is the "
                "limit; see what their driver says, and restart the energy agent"
            )

    def _check_once(self, meter: Meter) -> None:
        """Refuse a meter whose joules another one, which is watched, counts already."""
        twice = [poller for poller in self._pollers.values() if hold_the_same(poller.scope, meter.scope)]
        if twice:
            meter.close()
            raise MeterUnavailable(
                f"the meter of {twice[0].group} counts the same CPUs ({twice[0].scope} and {meter.scope}): "
                "a GPU's module holds the CPU and memory that RAPL would count again; watch one of them"
            )

    async def describe(self) -> list[wire.MeterDescription]:
        """Every meter of the host. MeterUnavailable where a driver does not answer."""
        return await self._calls.run(meter_descriptions)

    def check_room(self) -> None:
        if self._num_watches >= _MAX_WATCHES:
            raise MeterUnavailable(
                f"{self._num_watches} watches are open, {_MAX_WATCHES} is the limit; close some"
            )

    def _unused_left_s(self) -> float:
        if self._exit_after_idle_s is None:
            return 3600.0
        if self._num_watches:
            return self._exit_after_idle_s
        return max(0.0, self._exit_after_idle_s - (self.clock() - self._used_ns) / 1e9)

    def _bind(self, server: aio.Server, address: str) -> str:
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            check_socket_path(path)
            self._socket_paths.append(path)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"energy agent cannot listen on {address!r}: {error}") from error
        host, colon, asked = address.rpartition(":")
        return f"{host}{colon}{port}" if asked == "0" else address


class _Servicer(EnergyAgentServicer):
    """Bytes in, bytes out; the agent does the work."""

    def __init__(self, agent: EnergyAgent) -> None:
        self._agent = agent

    async def Watch(  # noqa: N802
        self,
        request: wire.WatchEnergyRequest,
        context: aio.ServicerContext[wire.WatchEnergyRequest, wire.EnergyReadings],
    ) -> AsyncIterator[wire.EnergyReadings]:
        try:
            key = key_of(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            self._agent.check_room()
        except MeterUnavailable as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        pipe = self._agent.make_pipe() if request.wants_pipe else None
        asks = self._agent.asks_path if request.can_ask else ""
        edges = self._agent.watch(key, request.group, pipe, can_ask=bool(asks))
        try:
            yield wire.EnergyReadings(
                pipe="" if pipe is None else str(pipe.path),
                asks=asks,
                metrics_address=self._agent.metrics_address,
            )
            async for told in edges:
                if not isinstance(told, MeterState):
                    yield wire.EnergyReadings(readings=[reading_message(reading) for reading in told])
                elif request.can_ask:
                    yield wire.EnergyReadings(state=told.value)
        except MeterUnavailable as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        finally:
            await edges.aclose()
            if pipe is not None:
                pipe.close()

    async def ReadClock(  # noqa: N802
        self,
        request: wire.ReadClockRequest,
        context: aio.ServicerContext[wire.ReadClockRequest, wire.ReadClockResponse],
    ) -> wire.ReadClockResponse:
        return wire.ReadClockResponse(t_ns=self._agent.clock())

    async def DescribeMeters(  # noqa: N802
        self,
        request: wire.DescribeMetersRequest,
        context: aio.ServicerContext[wire.DescribeMetersRequest, wire.DescribeMetersResponse],
    ) -> wire.DescribeMetersResponse:
        try:
            return wire.DescribeMetersResponse(meters=await self._agent.describe())
        except MeterUnavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))


async def _serve(options: argparse.Namespace) -> None:
    agent = EnergyAgent(
        poll_s=options.poll_ms / 1e3,
        cpu_static_w=options.cpu_static_w,
        cpu_core_w=options.cpu_core_w,
        exit_after_idle_s=options.exit_after_idle_s,
        host_meter=options.host_meter,
    )
    if options.metrics_port is not None:
        agent.serve_metrics(metrics_access(options), port=options.metrics_port)
    addresses = await agent.start(*options.listen)
    print(f"energy agent listens on {', '.join(addresses)}", flush=True)
    serving = asyncio.ensure_future(agent.serve_until_unused())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    await asyncio.gather(serving, return_exceptions=True)
    await agent.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal; None takes the process's own arguments. Also behind `wattline agent`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(_serve(agent_parser().parse_args(arguments)))
    except (OSError, ValueError) as error:
        raise SystemExit(f"energy agent: {error}") from error


if __name__ == "__main__":
    main()
