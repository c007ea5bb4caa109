"""A peer's process, seen from the bench: start its interpreter, hand it workloads, freeze it in between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil

from bench.peers.adapter import PeerSetup
from bench.peers.comparison import SystemFacts
from bench.priority import share_priority
from bench.record import ROOT, RequestTimes, Run
from bench.workload import Workload, workload_to_dict

LOAD_TIMEOUT_S = 1800.0
RUN_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
LINE_BYTES_MAX = 2**27
TAIL_LINES = 12


class PeerFailed(Exception):
    """A peer raised, died or gave no answer in time; the text has the end of what it printed."""


class PeerProcess:
    """One peer under its interpreter. Between runs it is stopped (SIGSTOP) and disturbs nobody."""

    def __init__(self, setup: PeerSetup, python: str) -> None:
        self._setup = setup
        self._python = python
        self._facts: SystemFacts | None = None
        self._log = tempfile.NamedTemporaryFile(prefix=f"peer-{setup.name}-", suffix=".log")  # noqa: SIM115
        self.admits_midway = True

    @property
    def facts(self) -> SystemFacts:
        """Known once the peer has started."""
        assert self._facts is not None
        return self._facts

    async def start(self) -> None:
        """Load the engine; the first time this converts or compiles. Raises PeerFailed."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                self._python,
                *("-m", "bench.peers.driver"),
                cwd=ROOT,
                env=_environment(self._setup.threads),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=self._log,
                limit=LINE_BYTES_MAX,
                start_new_session=True,
            )
        except OSError as error:
            raise PeerFailed(f"{self._setup.name}: cannot run {self._python}: {error}") from error
        share_priority(self._process.pid)
        ready = await self._ask(asdict(self._setup), LOAD_TIMEOUT_S)
        self._facts = SystemFacts(
            name=self._setup.name,
            version=str(ready["version"]),
            is_ours=False,
            has_prefix_cache=bool(ready["has_prefix_cache"]),
        )
        self.admits_midway = bool(ready["admits_midway"])
        self._signal(signal.SIGSTOP)

    async def run(self, workload: Workload) -> Run:
        """Drive the workload in the peer. Raises PeerFailed."""
        self._signal(signal.SIGCONT)
        try:
            answer = await self._ask(workload_to_dict(workload), RUN_TIMEOUT_S)
        finally:
            self._signal(signal.SIGSTOP)
        times = answer["times"]
        assert isinstance(times, list)
        requests = tuple(RequestTimes(**one | {"head": tuple(one["head"])}) for one in times)
        return Run(times=requests, wall_s=float(str(answer["wall_s"])))

    def pids(self) -> Sequence[int]:
        """The peer's process and all that descend from it."""
        root = psutil.Process(self._process.pid)
        return [root.pid, *(child.pid for child in root.children(recursive=True))]

    async def stop(self) -> None:
        """End the peer: politely, then by force."""
        if hasattr(self, "_process"):
            self._signal(signal.SIGCONT)
            assert self._process.stdin is not None
            self._process.stdin.close()
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            self._signal(signal.SIGKILL)
            await self._process.wait()
        self._log.close()

    async def _ask(self, question: dict[str, object], timeout_s: float) -> dict[str, object]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                self._process.stdin.write(json.dumps(question).encode() + b"\n")
                await self._process.stdin.drain()
                line = await self._process.stdout.readline()
        except TimeoutError as error:
            raise PeerFailed(
                f"{self._setup.name} gave no answer in {timeout_s:g} s\n{self._tail()}"
            ) from error
        except ConnectionError:
            line = b""
        if not line:
            raise PeerFailed(f"{self._setup.name} ended\n{self._tail()}")
        answer: dict[str, object] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self._setup.name}: {answer['error']}\n{self._tail()}")
        return answer

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _tail(self) -> str:
        lines = Path(self._log.name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


def _environment(threads: int) -> dict[str, str]:
    """Ours without what points Python at our packages, and with the thread count that OpenMP reads."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
