"""A server of the bench in a process of its own: started, asked where it listens, ended.

It is run as `python -m replicas.rank.launch PARENT MODULE ARGUMENTS`, so it dies with the bench. It says one
JSON object on one line of standard output, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.priority import share_priority
from bench.record import ROOT

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
LOG_TAIL_BYTES = 2000


class ServerFailed(Exception):
    """A server did not come up; the text has the end of what it printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """What a server says of itself: `pids` by role, `version` where it is somebody else's."""

    address: str
    pids: Mapping[str, int]
    version: str = ""


class Child:
    """One server; use as an async context. Owns the process."""

    def __init__(self, module: str, arguments: Sequence[str] = ()) -> None:
        self._module = module
        self._arguments = tuple(arguments)
        self._log = tempfile.NamedTemporaryFile(prefix="wattline-bench-", suffix=".log")  # noqa: SIM115

    async def __aenter__(self) -> Listening:
        """Raises ServerFailed."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "replicas.rank.launch", str(os.getpid()), self._module, *self._arguments),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        share_priority(self._process.pid)
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await self._process.stdout.readline()
            return Listening(**json.loads(line))
        except (TimeoutError, ValueError) as error:
            await self.__aexit__()
            raise ServerFailed(f"{self._module} did not come up: {self._last_words()}") from error
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_exc: object) -> None:
        """End of input, then SIGKILL to its session."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    def _last_words(self) -> str:
        return Path(self._log.name).read_text(errors="replace")[-LOG_TAIL_BYTES:].strip() or "it said nothing"


async def serve_until_told(listening: Listening, out_fd: int) -> None:
    """In the child: say where it listens, and wait for the end of its input."""
    with os.fdopen(out_fd, "w") as out:
        fields = {"address": listening.address, "pids": dict(listening.pids), "version": listening.version}
        out.write(json.dumps(fields) + "\n")
    await asyncio.to_thread(sys.stdin.read)


def keep_stdout() -> int:
    """In the child, before anything prints: what it prints goes to its log. Returns the real output."""
    out_fd = os.dup(1)
    os.dup2(2, 1)
    return out_fd
