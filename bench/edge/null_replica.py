"""One replica of the null engine that dials the routers it is told: supervisor and rank, without Ray.

`python -m bench.edge.null_replica '{"model": ..., ...}'`, the fields of `ReplicaPlan`; see `child.py` for
what it says and when it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.edge.child import Listening, keep_stdout, serve_until_told
from bench.priority import share_priority_below
from replicas.config import EngineLimits, NullEngineConfig, ReplicaConfig
from replicas.long_lived import spare_the_collector
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor

READY_TIMEOUT_S = 60.0
BLOCK_TOKENS = 16
STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """`routers` are link addresses; the engine holds `streams` of `context_tokens` each at once."""

    model: str
    routers: tuple[str, ...]
    step_ms: float
    streams: int
    vocab_size: int
    context_tokens: int

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(
            max_sequences=self.streams,
            step_tokens=max(STEP_TOKENS, self.streams),
            block_tokens=BLOCK_TOKENS,
            num_blocks=self.streams * (self.context_tokens // BLOCK_TOKENS + 1),
        )

    @property
    def engine(self) -> NullEngineConfig:
        return NullEngineConfig(
            step_ms=self.step_ms,
            prefill_tokens_per_s=1e9,
            vocab_size=self.vocab_size,
            context_tokens=self.context_tokens,
        )


async def serve(plan: ReplicaPlan, out_fd: int) -> None:
    with tempfile.TemporaryDirectory(prefix="wlb-") as folder:
        replica = ReplicaConfig(
            model=plan.model,
            source="null",
            replica_id=plan.model,
            routers=plan.routers,
            limits=plan.limits,
            null=plan.engine,
            runtime_dir=folder,
            ready_timeout_s=READY_TIMEOUT_S,
        )
        supervisor = Supervisor(replica, SubprocessRankGroup(runtime_dir=Path(folder)), lambda _: None)
        spare_the_collector()
        await supervisor.start()
        try:
            share_priority_below()
            pids = {"supervisor": os.getpid(), "rank": supervisor.processes[0].pid}
            await serve_until_told(Listening(address="", pids=pids), out_fd)
        finally:
            await supervisor.stop()


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    asyncio.run(serve(ReplicaPlan(**fields | {"routers": tuple(fields["routers"])}), keep_stdout()))
