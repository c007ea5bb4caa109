"""The processes of one rank group: start them, learn of a death, kill them all.

A group is one failure domain, so nothing here restarts a rank. `SubprocessRankGroup` runs the ranks as
children on this host, for tests, benchmarks and a replica without a cluster.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from replicas.config import RankConfig

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
GONE_TIMEOUT_S = 10.0
"""How long a killed process group may take to vanish before it is left to the kernel."""
GONE_POLL_S = 0.01
LAST_WORDS_CHARS = 300
LAST_WORDS_READ_BYTES = 8192

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProcess:
    """One running rank. `device` is `cpu`, or the UUID of its GPU (`GPU-...`), which the meters go by.

    `node` and `address` are of a rank on another host than its supervisor, where alone its pid has a meaning;
    both are empty on the supervisor's.
    """

    rank: int
    pid: int
    device: str
    node: str = ""
    address: str = ""


class RankGroup(Protocol):
    """The processes of one group. Started once, killed once, never restarted."""

    async def start(self, configs: Sequence[RankConfig]) -> tuple[RankProcess, ...]:
        """Start one process per config, in rank order. If one cannot start, none is left running."""

    async def wait_death(self) -> str:
        """Return when the first rank is gone, with the reason in words."""

    async def kill(self) -> None:
        """SIGKILL every rank with all its children; return when they are gone. Idempotent."""


class SubprocessRankGroup:
    """Ranks as child processes of this one, each in a session of its own, logging to `runtime_dir`.

    A rank dies with this process, whatever kills it. `module` is run with `--config @FILE`, where the file
    holds the RankConfig as JSON.
    """

    def __init__(self, *, runtime_dir: Path, module: str = "replicas.rank.main") -> None:
        self._runtime_dir = runtime_dir
        self._module = module
        self._children: list[_Child] = []
        self._is_gone = False

    async def start(self, configs: Sequence[RankConfig]) -> tuple[RankProcess, ...]:
        assert not self._children, "a rank group starts once"
        self._runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            for config in configs:
                self._children.append(await _spawn(config, self._module, self._runtime_dir))
        except BaseException:
            await self.kill()
            raise
        return tuple(
            RankProcess(rank=child.config.rank, pid=child.process.pid, device=child.config.device)
            for child in self._children
        )

    async def wait_death(self) -> str:
        waits = {asyncio.ensure_future(child.process.wait()): child for child in self._children}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return "; ".join(sorted(_death_reason(waits[wait]) for wait in done))

    async def kill(self) -> None:
        if self._is_gone:  # Their numbers may belong to others by now.
            return
        for child in self._children:
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
        await asyncio.gather(*(_wait_gone(child) for child in self._children))
        self._is_gone = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Child:
    config: RankConfig
    process: Process
    config_path: Path
    log_path: Path


async def _spawn(config: RankConfig, module: str, runtime_dir: Path) -> _Child:
    name = f"{config.group}-{config.epoch}-rank{config.rank}"
    config_path, log_path = runtime_dir / f"{name}.json", runtime_dir / f"{name}.log"
    config_path.write_text(json.dumps(asdict(config)), encoding="utf-8")
    threads = dict.fromkeys(THREAD_VARIABLES, str(config.threads))
    launch = ("-m", "replicas.rank.launch", str(os.getpid()), module, "--config", f"@{config_path}")
    with log_path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *launch,
            stdin=DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    logger.info("rank_started rank=%d pid=%d log=%s", config.rank, process.pid, log_path)
    return _Child(config=config, process=process, config_path=config_path, log_path=log_path)


async def _wait_gone(child: _Child) -> None:
    """Until the rank is reaped and its process group is empty."""
    try:
        async with asyncio.timeout(GONE_TIMEOUT_S):
            await child.process.wait()
            while _has_members(child.process.pid):  # noqa: ASYNC110 (the kernel signals no such event)
                await asyncio.sleep(GONE_POLL_S)
    except TimeoutError:
        logger.error(
            "rank_not_gone rank=%d pid=%d after_s=%g", child.config.rank, child.process.pid, GONE_TIMEOUT_S
        )
    child.config_path.unlink(missing_ok=True)


def _has_members(process_group: int) -> bool:
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    return True


def _death_reason(child: _Child) -> str:
    code = child.process.returncode
    assert code is not None
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    words = _last_words(child.log_path)
    said = f": {words}" if words else ""
    return f"rank {child.config.rank} (pid {child.process.pid}) {how}{said}; log: {child.log_path}"


def _last_words(log_path: Path) -> str:
    """The last line a rank wrote, bounded; it says why where a traceback ended the process."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log_path.stat().st_size - LAST_WORDS_READ_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:LAST_WORDS_CHARS] for line in reversed(lines) if line.strip()), "")
