"""A rank group as real processes, seen as a supervisor sees it: through one socket to rank 0."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from replicas.config import RankConfig, rank_config_to_json
from replicas.expert_loads import ExpertLoads
from replicas.frames import Command, EngineFailure, Event, LoadingProgress, read_event, write_command
from replicas.parallel.rendezvous import open_rendezvous
from replicas.request import EngineReady, FinishReason, SequenceDelta
from replicas.step_report import StepReport

TIMEOUT_S = 150.0
NEEDLESS = ("transformers", "tokenizers", "huggingface_hub")
"""Seconds of a rank's start if it imported them: no rank here can."""
RUN_RANK = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split()))
from replicas.rank.main import main
main(sys.argv[1:])
"""


@dataclass(slots=True)
class LiveGroup:
    """The processes of a group, the open socket, and what has come through it."""

    ranks: list[Process]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    tokens: dict[int, list[int]] = field(default_factory=dict)
    last: dict[int, SequenceDelta] = field(default_factory=dict)
    num_computed: int = 0
    """Tokens that steps have computed, repeated ones too."""

    @property
    def finishes(self) -> dict[int, FinishReason | None]:
        return {request_id: delta.finish for request_id, delta in self.last.items()}

    async def send(self, command: Command) -> None:
        await write_command(self.writer, command)

    async def send_together(self, *commands: Command) -> None:
        """Rank 0 finds all of them at once, however slowly they are written: it is stopped meanwhile."""
        self.ranks[0].send_signal(signal.SIGSTOP)
        for command in commands:
            await self.send(command)
        self.ranks[0].send_signal(signal.SIGCONT)

    async def read(self) -> Event:
        async with asyncio.timeout(TIMEOUT_S):
            return await read_event(self.reader)

    async def read_ready(self) -> EngineReady:
        while True:
            event = await self.read()
            if isinstance(event, EngineReady):
                return event
            assert isinstance(event, LoadingProgress), event

    async def read_step(self) -> StepReport:
        event = await self.read()
        while isinstance(event, ExpertLoads):
            event = await self.read()
        assert isinstance(event, StepReport), event
        if event.record is not None:
            self.num_computed += sum(member.new_tokens for member in event.record.members)
        for delta in event.all_deltas():
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish is not None:
                self.last[delta.request_id] = delta
        return event

    async def read_until(self, is_done: Callable[[LiveGroup], bool]) -> None:
        while not is_done(self):
            await self.read_step()

    async def read_experts(self, num_tokens: int) -> ExpertLoads:
        """The loads when they add up to `num_tokens`; steps must not follow."""
        while True:
            event = await self.read()
            assert isinstance(event, ExpertLoads), event
            if sum(event.tokens) == num_tokens:
                return event

    async def read_failure(self) -> EngineFailure:
        while True:
            event = await self.read()
            if isinstance(event, EngineFailure):
                return event

    async def exit_codes(self) -> list[int]:
        async with asyncio.timeout(TIMEOUT_S):
            return [await rank.wait() for rank in self.ranks]


@asynccontextmanager
async def open_group(config: RankConfig) -> AsyncIterator[LiveGroup]:
    """Start every rank of the group that `config` is rank 0 of; kill what is left of it at the end.

    All hosts of a group over hosts are this one, reached over loopback.
    """
    connected: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_unix_server(
        lambda reader, writer: connected.put_nowait((reader, writer)), config.socket_path
    )
    meeting = open_rendezvous("127.0.0.1") if config.parallel.hosts > 1 else None
    ranks = [
        await spawn(replace(config, rank=rank, rendezvous=meeting and meeting.told_to(rank)))
        for rank in range(config.num_ranks)
    ]
    for listener in (meeting.plan_fd, meeting.store_fd) if meeting else ():
        os.close(listener)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await connected.get()
        yield LiveGroup(ranks, reader, writer)
        writer.close()
    finally:
        for rank in ranks:
            if rank.returncode is None:
                rank.kill()
            await rank.communicate()
        server.close()


async def spawn(config: RankConfig) -> Process:
    listeners = (config.rendezvous.plan_fd, config.rendezvous.store_fd) if config.rendezvous else ()
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        RUN_RANK,
        " ".join(NEEDLESS),
        "--config",
        rank_config_to_json(config),
        stdin=DEVNULL,
        stderr=PIPE,
        pass_fds=[listener for listener in listeners if listener >= 0],
    )
