"""The engine alone: one rank group behind its Unix socket, no link, no router, no text."""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.record import RequestTimes
from bench.workload import Workload
from replicas.config import EngineLimits, NullEngineConfig, ParallelConfig, RankConfig
from replicas.expert_loads import ExpertLoads
from replicas.frames import Submit, read_event, write_command
from replicas.request import EngineReady, GenerationRequest, StepResult
from replicas.supervisor.rank_group import RankProcess, SubprocessRankGroup


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
    max_sequences: int = 64


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
        parallel = ParallelConfig(tensor=setup.tensor, expert=setup.expert, layout=setup.layout)
        return [
            RankConfig(
                group=Path(self._folder.name).name,
                epoch=1,
                rank=rank,
                source=setup.source,
                parallel=parallel,
                limits=EngineLimits(max_sequences=setup.max_sequences),
                dtype=setup.dtype,
                threads=setup.threads,
                kernels=setup.kernels,
                quantization=setup.quantization,
                socket_path=socket_path if rank == 0 else "",
                null=setup.null,
            )
            for rank in range(parallel.num_ranks)
        ]

    async def run(self, workload: Workload) -> tuple[list[RequestTimes], float]:
        """Drive the workload closed-loop; returns the times of its requests and the wall seconds."""
        live: dict[int, list[float]] = {}
        done: list[RequestTimes] = []
        waiting = list(enumerate(workload.prompts))[::-1]
        start_s = time.perf_counter()
        while waiting or live:
            while waiting and len(live) < workload.concurrency:
                request_id, prompt = waiting.pop()
                live[request_id] = [time.perf_counter()]
                await write_command(self._writer, Submit(request=self._request(request_id, prompt, workload)))
            event = await read_event(self._reader)
            if isinstance(event, ExpertLoads):
                continue
            assert isinstance(event, StepResult), event
            now_s = time.perf_counter()
            for delta in event.deltas:
                marks = live[delta.request_id]
                marks.extend([now_s] * len(delta.token_ids))
                if delta.finish is not None:
                    assert delta.error is None, delta.error
                    done.append(_times(live.pop(delta.request_id)))
        return done, time.perf_counter() - start_s

    def _request(self, request_id: int, prompt: tuple[int, ...], workload: Workload) -> GenerationRequest:
        """Lanes in turn."""
        assert self.ready is not None, "a workload runs on an engine that is ready"
        return GenerationRequest(
            request_id=request_id,
            prompt_ids=prompt,
            max_tokens=workload.output_tokens,
            lane=request_id % self.ready.lanes,
        )


def _times(marks: list[float]) -> RequestTimes:
    return RequestTimes(
        submitted_s=marks[0], first_token_s=marks[1], last_token_s=marks[-1], output_tokens=len(marks) - 1
    )
