"""The engine alone: one rank group behind its Unix socket, no link, no router, no text."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from bench.record import Run
from bench.streams import Streams, Submission
from bench.workload import Workload
from replicas.config import EngineLimits, NullEngineConfig, ParallelConfig, RankConfig
from replicas.frames import Submit, read_event, write_command
from replicas.request import EngineReady, GenerationRequest, StepResult
from replicas.supervisor.rank_group import RankProcess, SubprocessRankGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """Which engine: `source` is a checkpoint folder or the word null."""

    source: str
    tensor: int = 1
    expert: int = 1
    threads: int = 1
    dtype: str = "auto"
    kernels: str = "auto"
    null: NullEngineConfig = field(default_factory=NullEngineConfig)
    limits: EngineLimits = field(default_factory=EngineLimits)


class EngineUnderTest:
    """A running rank group and the socket to its rank 0. Use as an async context."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup = setup
        self._folder = tempfile.TemporaryDirectory(prefix="wattline-bench-")
        self._ranks = SubprocessRankGroup(runtime_dir=Path(self._folder.name))
        self.processes: tuple[RankProcess, ...] = ()
        self.ready: EngineReady | None = None

    async def __aenter__(self) -> EngineUnderTest:
        socket_path = str(Path(self._folder.name) / "rank0.sock")
        attached: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()
        self._server = await asyncio.start_unix_server(
            lambda reader, writer: attached.set_result((reader, writer)), socket_path
        )
        self.processes = await self._ranks.start(self._configs(socket_path))
        self._reader, self._writer = await attached
        while not isinstance(event := await read_event(self._reader), EngineReady):
            pass
        self.ready = event
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._ranks.kill()
        self._writer.close()
        self._server.close()
        self._folder.cleanup()

    def _configs(self, socket_path: str) -> list[RankConfig]:
        setup = self._setup
        parallel = ParallelConfig(tensor=setup.tensor, expert=setup.expert)
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
                socket_path=socket_path if rank == 0 else "",
                null=setup.null,
            )
            for rank in range(parallel.num_ranks)
        ]

    async def run(self, workload: Workload) -> Run:
        """Drive the workload to its end. Raises RuntimeError when a request fails."""
        streams = Streams(workload)
        while not streams.is_done:
            for one in streams.due():
                await write_command(self._writer, Submit(request=_request(one)))
            event = await read_event(self._reader)
            assert isinstance(event, StepResult), event
            for delta in event.deltas:
                if delta.error is not None:
                    raise RuntimeError(f"request {delta.request_id}: {delta.error}")
                streams.deliver(delta.request_id, delta.token_ids, is_finished=delta.finish is not None)
        return Run(times=streams.times(), wall_s=streams.wall_s())


def _request(one: Submission) -> GenerationRequest:
    return GenerationRequest(request_id=one.request_id, prompt_ids=one.prompt, max_tokens=one.output_tokens)
