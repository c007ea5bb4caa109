"""The engine alone: one rank group behind its Unix socket, no link, no router, no text."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bench.priority import share_priority
from bench.record import Run
from bench.streams import Streams, Submission
from bench.workload import Workload
from replicas.config import EngineLimits, NullEngineConfig, ParallelConfig, RankConfig
from replicas.errors import RankLost
from replicas.expert_loads import ExpertLoads
from replicas.frames import Submit, read_event, write_command
from replicas.models.spec_reader import read_spec_apart
from replicas.request import EngineReady, GenerationRequest
from replicas.step_report import StepReport
from replicas.supervisor.rank_group import RankProcess, SubprocessRankGroup

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """Which engine: `source` is a checkpoint folder or the word null."""

    source: str
    tensor: int = 1
    expert: int = 1
    layout: str = "shared"
    threads: int = 1
    dtype: str = "auto"
    kernels: str = "auto"
    quantization: str = "none"
    null: NullEngineConfig = field(default_factory=NullEngineConfig)
    limits: EngineLimits = field(default_factory=EngineLimits)


class EngineUnderTest:
    """A running rank group and the socket to its rank 0. Use as an async context."""

    def __init__(self, setup: EngineSetup) -> None:
        self.setup = setup
        self._folder = tempfile.TemporaryDirectory(prefix="wattline-bench-")
        self._ranks = SubprocessRankGroup(runtime_dir=Path(self._folder.name))
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.processes: tuple[RankProcess, ...] = ()
        self.ready: EngineReady | None = None

    async def __aenter__(self) -> EngineUnderTest:
        try:
            await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._ranks.kill()
        if self._writer is not None:
            self._writer.close()
        if self._server is not None:
            self._server.close()
        self._folder.cleanup()

    async def run(self, workload: Workload) -> Run:
        """Drive the workload to its end. Raises RuntimeError if a request fails, RankLost if a rank dies."""
        return await self._while_alive(self._drive(workload))

    async def submit(self, request: GenerationRequest) -> None:
        assert self._writer is not None
        await write_command(self._writer, Submit(request=request))

    async def next_step(self) -> StepReport:
        """What the engine says next of its requests. Raises RankLost."""
        while isinstance(event := await read_event(self._reader), ExpertLoads):
            pass
        assert isinstance(event, StepReport), event
        return event

    async def _start(self) -> None:
        socket_path = str(Path(self._folder.name) / "rank0.sock")
        attached: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()
        self._server = await asyncio.start_unix_server(
            lambda reader, writer: attached.set_result((reader, writer)), socket_path
        )
        self.processes = await self._ranks.start(self._configs(socket_path))
        for process in self.processes:
            share_priority(process.pid)
        self.ready = await self._while_alive(self._attach(attached))

    async def _attach(
        self, attached: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    ) -> EngineReady:
        self._reader, self._writer = await attached
        while not isinstance(event := await read_event(self._reader), EngineReady):
            pass
        return event

    async def _while_alive(self, work: Coroutine[None, None, T]) -> T:
        """The result of `work`. Raises RankLost with a rank's last words when one dies before."""
        doing, dying = asyncio.ensure_future(work), asyncio.ensure_future(self._ranks.wait_death())
        try:
            await asyncio.wait((doing, dying), return_when=asyncio.FIRST_COMPLETED)
            if doing.done() and not isinstance(doing.exception(), RankLost):
                return doing.result()
            raise RankLost(f"the engine of {self.setup.source} ended: {await dying}")
        finally:
            doing.cancel()
            dying.cancel()

    async def _drive(self, workload: Workload) -> Run:
        assert self.ready is not None, "a workload runs on an engine that is ready"
        streams = Streams(workload)
        while not streams.is_done:
            for one in streams.due():
                await self.submit(_request(one, num_lanes=self.ready.lanes))
            for delta in (await self.next_step()).all_deltas():
                if delta.error is not None:
                    raise RuntimeError(f"request {delta.request_id}: {delta.error}")
                streams.deliver(delta.request_id, delta.token_ids, is_finished=delta.finish is not None)
        return Run(times=streams.times(), wall_s=streams.wall_s())

    def _configs(self, socket_path: str) -> list[RankConfig]:
        setup = self.setup
        spec = None if setup.source == "null" else read_spec_apart(Path(setup.source))
        parallel = ParallelConfig(tensor=setup.tensor, expert=setup.expert, layout=setup.layout)
        return [
            RankConfig(
                group=Path(self._folder.name).name,
                epoch=1,
                rank=rank,
                source=setup.source,
                parallel=parallel,
                limits=setup.limits,
                dtype=setup.dtype,
                threads=setup.threads,
                kernels=setup.kernels,
                quantization=setup.quantization,
                socket_path=socket_path if rank == 0 else "",
                spec=spec,
                null=setup.null,
            )
            for rank in range(parallel.num_ranks)
        ]


def _request(one: Submission, *, num_lanes: int) -> GenerationRequest:
    """Lanes in turn."""
    return GenerationRequest(
        request_id=one.request_id,
        prompt_ids=one.prompt,
        max_tokens=one.output_tokens,
        lane=one.request_id % num_lanes,
    )
