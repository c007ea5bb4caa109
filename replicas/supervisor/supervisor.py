"""The supervisor of one replica: starts its ranks, keeps its links, answers for its health, ends it.

The group is one failure domain: the first rank that dies or stalls takes all with it. Then the supervisor
fences the group, says Goodbye, kills every process and calls `on_fatal` once; it restarts nothing. No tensor
work and no blocking call here: its answers never wait for a step. The composition (Ray Serve, a test, a
benchmark) owns one Supervisor per replica and calls `start`, then `drain` and `stop`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from replicas.config import RankConfig, ReplicaConfig
from replicas.errors import RankLost
from replicas.frames import LoadingProgress
from replicas.link.messages import ReplicaCard
from replicas.models.spec import ModelSpec
from replicas.models.spec_reader import read_spec_apart
from replicas.parallel.degrees import shard_of
from replicas.request import EngineReady
from replicas.supervisor.engine_socket import EngineSocket
from replicas.supervisor.group_files import GroupFiles
from replicas.supervisor.live_group import LiveGroup, next_event
from replicas.supervisor.meter_feed import make_feed
from replicas.supervisor.metrics import MetricsSnapshot, ReplicaMetrics
from replicas.supervisor.rank_group import RankGroup, RankProcess
from replicas.supervisor.tokenizer_digest import tokenizer_digest

FIRST_LINK_TIMEOUT_S = 10.0
CLEAN_EXIT_TIMEOUT_S = 3.0
DRAIN_RESERVE_S = 5.0
"""Of the drain budget: left for `stop`."""
LAST_BILLS_TIMEOUT_S = 0.5
DRAINED = "drained"
"""The last word of a replica whose streams outlast its drain."""

logger = logging.getLogger(__name__)


class Supervisor:
    """One life of one rank group, on the one event loop of its process.

    `epoch` orders the lives of a replica id; the default is the wall clock in seconds, so a later life has a
    larger one. `on_fatal` is called at most once, with the reason, after every process of a group that was
    ready is gone; not for a group that did not become ready, where `start` raises, and not for `stop`.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        ranks: RankGroup,
        on_fatal: Callable[[str], None],
        *,
        epoch: int | None = None,
        first_link_timeout_s: float = FIRST_LINK_TIMEOUT_S,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._on_fatal = on_fatal
        self._first_link_timeout_s = first_link_timeout_s
        self._files = GroupFiles.of(config, epoch=int(time.time()) if epoch is None else epoch)
        self._socket = EngineSocket(self._files.socket_path)
        self._progress: dict[int, LoadingProgress] = {}
        self._metrics: ReplicaMetrics | None = None
        self._group: LiveGroup | None = None
        self._runner: asyncio.Task[None] | None = None
        self._fatal_reason: str | None = None
        self._is_stopping = False
        self.processes: tuple[RankProcess, ...] = ()

    @property
    def epoch(self) -> int:
        return self._files.epoch

    @property
    def progress(self) -> tuple[LoadingProgress, ...]:
        """How far each rank that said something got with loading, in rank order."""
        return tuple(self._progress[rank] for rank in sorted(self._progress))

    @property
    def num_in_flight(self) -> int:
        return self._group.dispatcher.num_in_flight if self._group else 0

    @property
    def is_draining(self) -> bool:
        return self._group is not None and self._group.dispatcher.is_draining

    async def start(self) -> None:
        """Return when the engine is ready and a first router is attached, or none was found in time.

        Raises BadCheckpoint or BadParallelism before a rank starts, RankLost if a rank dies or the engine is
        not ready within `ready_timeout_s`; nothing is left behind then.
        """
        assert self._runner is None, "a supervisor starts once"
        try:
            engine = await self._start_engine()
            logger.info(
                "engine_ready device=%s dtype=%s kernels=%s", engine.device, engine.dtype, engine.kernels
            )
            self._group = self._open_group(engine)
        except BaseException:
            await self._ranks.kill()
            await self._release()
            raise
        self._runner = asyncio.create_task(self._run(self._group), name="rank group")
        await self._await_first_link(self._group)

    def check_health(self) -> None:
        """Raises RankLost if a rank is dead, or the step under way lasts too long."""
        if self._fatal_reason is not None:
            raise RankLost(self._fatal_reason)
        if self._group is None or self._runner is None or self._runner.done():
            raise RankLost("the replica is not running")
        self._group.check()

    async def drain(self, reason: str = "the replica is being replaced") -> None:
        """Refuse new requests and return when those in flight have ended, or the budget has.

        The budget is `drain_s` less what `stop` may need.
        """
        if self._group is None:
            return
        dispatcher = self._group.dispatcher
        dispatcher.begin_drain(reason)
        try:
            async with asyncio.timeout(max(0.0, self._config.drain_s - DRAIN_RESERVE_S)):
                await dispatcher.idle.wait()
        except TimeoutError:
            logger.warning("drain_incomplete in_flight=%d", dispatcher.num_in_flight)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_BILLS_TIMEOUT_S):
                await dispatcher.billed.wait()

    async def stop(self, reason: str = "the replica stops") -> None:
        """End everything: Goodbye, ranks, files. Bounded; what is in flight is not finished. Idempotent."""
        if self._is_stopping:
            return
        self._is_stopping = True
        if self._runner is None or self._group is None:
            return
        if self._fatal_reason is not None:
            await asyncio.wait({self._runner})
            return
        # Routers let the streams that outlast a drain go on elsewhere.
        is_cut = self.is_draining and self.num_in_flight > 0
        await self._group.close_links(DRAINED if is_cut else reason)
        self._runner.cancel()
        await asyncio.wait({self._runner})
        await self._socket.shut_down()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLEAN_EXIT_TIMEOUT_S):
                await self._ranks.wait_death()
        await self._ranks.kill()
        await self._release()
        logger.info("replica_stopped id=%s reason=%s", self._config.replica_id, reason)

    async def _start_engine(self) -> EngineReady:
        configs = self._rank_configs(await self._read_spec())
        self._files.remove_shared()
        await self._socket.listen()
        self.processes = await self._ranks.start(configs)
        ready = asyncio.ensure_future(self._read_until_ready())
        death = asyncio.ensure_future(self._ranks.wait_death())
        timeout_s = self._config.ready_timeout_s
        try:
            done, _ = await asyncio.wait(
                {ready, death}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if ready in done:
                return ready.result()
            if death in done:
                raise RankLost(f"the group did not start: {death.result()}")
            raise RankLost(
                f"the engine was not ready after ready_timeout_s={timeout_s:g}; raise it or see the logs"
            )
        finally:
            ready.cancel()
            death.cancel()

    async def _read_until_ready(self) -> EngineReady:
        while True:
            event = await next_event(self._socket, self._ranks)
            if isinstance(event, EngineReady):
                return event
            if isinstance(event, LoadingProgress):
                self._progress[event.rank] = event

    async def _read_spec(self) -> ModelSpec | None:
        """Of the checkpoint, once for all ranks; None for the null engine."""
        if self._config.source == "null":
            return None
        spec = await asyncio.to_thread(read_spec_apart, Path(self._config.source))
        shard_of(spec, self._config.parallel, 0)
        return spec

    def _rank_configs(self, spec: ModelSpec | None) -> list[RankConfig]:
        config, files = self._config, self._files
        return [
            RankConfig(
                group=files.group,
                epoch=files.epoch,
                rank=rank,
                source=config.source,
                parallel=config.parallel,
                limits=config.limits,
                device=config.device,
                dtype=config.dtype,
                threads=config.threads_per_rank,
                kernels=config.kernels,
                attention=config.attention,
                quantization=config.quantization,
                socket_path=str(files.socket_path) if rank == 0 else "",
                shared_dir=config.shared_dir,
                spec=spec,
                null=config.null,
            )
            for rank in range(config.parallel.num_ranks)
        ]

    def _open_group(self, engine: EngineReady) -> LiveGroup:
        config = self._config
        self._metrics = ReplicaMetrics(
            MetricsSnapshot(load=engine.load),
            engine={"device": engine.device, "dtype": engine.dtype, "kernels": engine.kernels},
        )
        card = ReplicaCard(
            config=config,
            epoch=self.epoch,
            engine=engine,
            ranks=self.processes,
            tokenizer_digest="" if config.source == "null" else tokenizer_digest(Path(config.source)),
            engine_version=version("wattline"),
            host=socket.gethostname(),
            supervisor_pid=os.getpid(),
            metrics_address=self._metrics.serve(config.metrics),
        )
        return LiveGroup(
            card=card,
            socket=self._socket,
            ranks=self._ranks,
            feed=make_feed(config, group=self._files.group, ranks=self.processes),
            metrics=self._metrics,
        )

    async def _await_first_link(self, group: LiveGroup) -> None:
        assert self._runner is not None
        linked = asyncio.ensure_future(group.dispatcher.first_link.wait())
        try:
            await asyncio.wait(
                {linked, self._runner},
                timeout=self._first_link_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            linked.cancel()
        if self._fatal_reason is not None:
            raise RankLost(self._fatal_reason)
        if not group.dispatcher.num_links:
            logger.warning("no_router_yet routers=%s", ",".join(self._config.routers))

    async def _run(self, group: LiveGroup) -> None:
        """Serve until the group is lost. The catch-all of this process: any failure ends the replica."""
        try:
            await group.run()
        except RankLost as error:
            await self._fail(group, str(error))
        except Exception as error:
            logger.exception("supervisor_failed")
            await self._fail(group, f"the supervisor failed: {type(error).__name__}: {error}")

    async def _fail(self, group: LiveGroup, reason: str) -> None:
        self._fatal_reason = reason
        group.dispatcher.fence()
        logger.error(
            "group_lost id=%s epoch=%d reason=%s in_flight=%d traces=%s",
            *(self._config.replica_id, self.epoch, reason, group.dispatcher.num_in_flight),
            group.dispatcher.traces,
        )
        await asyncio.gather(group.close_links(reason, is_lost=True), self._ranks.kill())
        await self._release()
        self._on_fatal(reason)

    async def _release(self) -> None:
        """Close and remove what is not a process."""
        self._socket.close()
        self._files.remove_shared()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
            self._metrics = None
