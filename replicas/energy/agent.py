"""The energy agent: the one process of a host that reads its meters, and serves the edges to whoever watches.

Started by the first supervisor of the host (`EnergyAgent`), or by hand: `python -m replicas.energy.agent`.
It never runs inside a rank. One meter is polled once, however many watch it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
from grpc import aio
from prometheus_client import CollectorRegistry

from protos import wattline_energy_pb2 as wire
from protos.wattline_energy_pb2_grpc import EnergyAgentServicer, add_EnergyAgentServicer_to_server
from replicas.config import METERS, MetricsAccess
from replicas.energy.agent_metrics import MeterSeries
from replicas.energy.agent_options import agent_parser, metrics_access
from replicas.energy.cpu_model import CpuModelMeter
from replicas.energy.edge_pipe import EdgePipe
from replicas.energy.host_meter import open_host_meter
from replicas.energy.meter import Meter, Reading, hold_the_same
from replicas.energy.nvml import NvmlMeter
from replicas.energy.poll_thread import PollThread
from replicas.energy.polling import MeterPoller
from replicas.energy.rapl import POWERCAP_DIR, RaplMeter
from replicas.energy.replay import FakeMeter
from replicas.energy.survey import survey_meters
from replicas.energy.zeus_meter import ZeusMeter
from replicas.errors import MeterUnavailable
from replicas.metrics_page import MetricsPage
from replicas.strict_messages import add_strictly

_LOG = logging.getLogger(__name__)
_FAKE_POWER_W = 100.0
_MAX_DEVICES = 64
_MAX_PIDS = 1024
_MAX_GROUP_CHARS = 256
_MAX_WATCHES = 256
_SOCKET_PATH_BYTES = 107
_STOP_GRACE_S = 0.1
_PIPE_INFIX = ".edges-"
_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    # A watch that reads a pipe hears nothing on its stream, and asks every 20 s whether we are there. gRPC
    # takes more than two such questions in five minutes for an attack, unless told, and ends the watch.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
)


class WatchKey(NamedTuple):
    """Watches with equal keys share one meter."""

    meter: str
    gpu_uuids: tuple[str, ...]
    pids: tuple[int, ...]


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
        self._cpu_static_w = cpu_static_w
        self._cpu_core_w = cpu_core_w
        self._clock = clock
        self._exit_after_idle_s = exit_after_idle_s
        self._host = open_host_meter(host_meter, powercap_dir)
        self._pollers: dict[WatchKey, MeterPoller] = {}
        self._making = asyncio.Lock()
        self._thread = PollThread(poll_s=poll_s)
        self._series = MeterSeries(
            self._pollers.values, host=self._host, count_reads=lambda: self._thread.num_reads
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
        elapsed_ns = max(self._clock() - self._started_ns, 1)
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
        page, self._page = self._page, None
        if page is not None:
            await asyncio.to_thread(page.close)
        for poller in list(self._pollers.values()):
            await self._end(poller)
        self._pollers.clear()
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

    async def watch(
        self, key: WatchKey, group: str, pipe: EdgePipe | None = None
    ) -> AsyncGenerator[list[Reading], None]:
        """Edges of a meter, from now on, here or in `pipe`. Raises MeterUnavailable before the first one."""
        async with self._making:
            poller = self._pollers.get(key)
            if poller is None:
                meter = await asyncio.to_thread(self._make_meter, key)
                self._check_once(meter)
                poller = MeterPoller(meter, group=group, seat=self._host.seat(meter) if self._host else None)
                self._pollers[key] = poller
                self._thread.add(poller)
                _LOG.info("energy_agent.meter_opened", extra={"group": group, "meter": type(meter).__name__})
            subscriber = poller.subscribe(pipe)
            self._num_watches += 1
        try:
            while True:
                yield await subscriber.take()
        finally:
            self._num_watches -= 1
            self._used_ns = self._clock()
            poller.unsubscribe(subscriber)
            if not poller.is_watched and self._pollers.get(key) is poller:
                del self._pollers[key]
                self._series.retire(poller)
                await self._end(poller)

    async def _end(self, poller: MeterPoller) -> None:
        """Whoever is cancelled meanwhile: it is read no more, and closed after its last round."""
        self._thread.remove(poller)

        def close() -> None:
            self._thread.wait_round()
            poller.close()

        await asyncio.shield(asyncio.to_thread(close))

    def _check_once(self, meter: Meter) -> None:
        """Refuse a meter whose joules another one, which is watched, counts already."""
        twice = [poller for poller in self._pollers.values() if hold_the_same(poller.scope, meter.scope)]
        if twice:
            meter.close()
            raise MeterUnavailable(
                f"the meter of {twice[0].group} counts the same CPUs ({twice[0].scope} and {meter.scope}): "
                "a GPU's module holds the CPU and memory that RAPL would count again; watch one of them"
            )

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
        return max(0.0, self._exit_after_idle_s - (self._clock() - self._used_ns) / 1e9)

    def _make_meter(self, key: WatchKey) -> Meter:
        """`auto` never answers for GPUs with an estimate of the CPUs: that would be off by any factor."""
        if key.meter == "fake":
            return FakeMeter(((0, _FAKE_POWER_W),), clock=self._clock)
        if key.meter == "nvml" or (key.meter == "auto" and key.gpu_uuids):
            return NvmlMeter(key.gpu_uuids, clock=self._clock)
        if key.meter == "rapl":
            return RaplMeter(clock=self._clock)
        if key.meter == "zeus":
            return ZeusMeter(clock=self._clock)
        if key.pids:
            return CpuModelMeter(
                key.pids, static_w=self._cpu_static_w, core_w=self._cpu_core_w, clock=self._clock
            )
        raise MeterUnavailable(
            f"meter {key.meter!r} has nothing to read: name gpu_uuids, or pids for an estimate"
        )

    def _bind(self, server: aio.Server, address: str) -> str:
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            _check_socket_path(path)
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
        problem = _problem(request)
        if problem:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        try:
            self._agent.check_room()
        except MeterUnavailable as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        pipe = self._agent.make_pipe() if request.wants_pipe else None
        edges = self._agent.watch(_key(request), request.group, pipe)
        try:
            yield wire.EnergyReadings(
                pipe="" if pipe is None else str(pipe.path), metrics_address=self._agent.metrics_address
            )
            async for batch in edges:
                yield wire.EnergyReadings(readings=[_message(reading) for reading in batch])
        except MeterUnavailable as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        finally:
            await edges.aclose()
            if pipe is not None:
                pipe.close()

    async def DescribeMeters(  # noqa: N802
        self,
        request: wire.DescribeMetersRequest,
        context: aio.ServicerContext[wire.DescribeMetersRequest, wire.DescribeMetersResponse],
    ) -> wire.DescribeMetersResponse:
        return wire.DescribeMetersResponse(meters=await asyncio.to_thread(_describe_meters))


def _key(request: wire.WatchEnergyRequest) -> WatchKey:
    """A meter of the whole host is one, whoever asks: two pollers of it would export its joules twice."""
    if request.meter in ("rapl", "zeus"):
        return WatchKey(request.meter, (), ())
    return WatchKey(request.meter or "auto", tuple(sorted(request.gpu_uuids)), tuple(sorted(request.pids)))


def _problem(request: wire.WatchEnergyRequest) -> str:
    """What is wrong with a watch, empty if nothing is."""
    if request.meter and request.meter not in METERS:
        return f"meter={request.meter!r}; give one of {', '.join(METERS)}"
    if len(request.gpu_uuids) > _MAX_DEVICES:
        return f"gpu_uuids has {len(request.gpu_uuids)} entries, {_MAX_DEVICES} is the limit; watch fewer"
    if len(request.pids) > _MAX_PIDS:
        return f"pids has {len(request.pids)} entries, {_MAX_PIDS} is the limit; watch fewer"
    if len(request.group) > _MAX_GROUP_CHARS:
        return f"group has {len(request.group)} characters, {_MAX_GROUP_CHARS} is the limit; shorten it"
    return ""


def _message(reading: Reading) -> wire.EnergyReading:
    return wire.EnergyReading(
        t_ns=reading.t_ns,
        energy_mj=reading.energy_mj,
        static_mj=reading.static_mj,
        host_mj=reading.host_mj,
        source=reading.source.value,
        confidence_factor=reading.confidence_factor,
        gap=reading.gap,
    )


def _describe_meters() -> list[wire.MeterDescription]:
    return [
        wire.MeterDescription(
            name=one.name,
            source=one.source.value,
            device=one.device,
            available=one.is_available,
            detail=one.detail,
            confidence_factor=one.confidence_factor,
        )
        for one in survey_meters()
    ]


def _check_socket_path(path: Path) -> None:
    """gRPC takes a socket file over in silence, also from a living agent; and it cuts long paths."""
    if len(bytes(path)) > _SOCKET_PATH_BYTES:
        raise ValueError(
            f"socket path {path} is longer than {_SOCKET_PATH_BYTES} bytes; use a shorter folder"
        )
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise OSError(f"an energy agent already listens on {path}; use it, or give --listen another path")


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
