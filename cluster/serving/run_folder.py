"""The folder of one `wattline up`: its lock, its state file, its logs and its sockets.

One `up` per folder: the lock is held by an open file, so it goes with the process however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from cluster.addresses import read_addresses
from cluster.command_error import CommandError
from cluster.router.siblings import index_of_file, socket_name
from cluster.serving.child_log import bound_log

MAX_PATH_CHARS = 38
"""Unix socket paths end at 107 characters, and Ray appends 68."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpState:
    """What a running `up` tells other commands. Addresses are empty until the router is up."""

    pid: int
    created_s: float
    """Start time of the process, since numbers of processes are used again."""
    is_ready: bool = False
    grpc: str = ""
    http: str = ""
    link: str = ""
    ray: str = ""
    """For another driver, which also needs the token."""

    def process(self) -> psutil.Process | None:
        """The process, if it still is the one that wrote this."""
        try:
            process = psutil.Process(self.pid)
            is_alive = process.create_time() == self.created_s and process.status() != psutil.STATUS_ZOMBIE
            return process if is_alive else None
        except psutil.NoSuchProcess:
            return None


class RunFolder:
    """Paths and lock under `runtime_dir`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def state_path(self) -> Path:
        return self.path / "up.json"

    @property
    def log_path(self) -> Path:
        return self.path / "up.log"

    @property
    def router_log_path(self) -> Path:
        return self.path / "router.log"

    @property
    def ledger_log_path(self) -> Path:
        return self.path / "ledger.log"

    def bound_logs(self) -> None:
        """Call it now and then: a child's log of `MAX_LOG_BYTES` is put aside, and the one before it goes."""
        for path in (self.router_log_path, self.ledger_log_path):
            bound_log(path)

    @property
    def ray_dir(self) -> Path:
        return self.path / "ray"

    @property
    def token_path(self) -> Path:
        """What Ray's daemons ask of whoever talks to them."""
        return self.path / "ray.token"

    @property
    def secret_path(self) -> Path:
        """What the routers of this run share, where the configuration names no file of its own."""
        return self.path / "router.secret"

    def router_socket(self, index: int) -> Path:
        """Where commands of this machine's user find router `index`, whatever its ports ask of callers."""
        return self.path / socket_name(index)

    def router_pids(self) -> dict[int, int]:
        """Of the routers that listen, by their number; one that leaves takes its file away."""
        found: dict[int, int] = {}
        for path in sorted(self.path.glob("router*.json")):
            with suppress(FileNotFoundError):
                found[index_of_file(path.stem)] = read_addresses(path).pid
        return dict(sorted(found.items()))

    @property
    def shared_dir(self) -> Path:
        """Where the groups of this run keep their rings; removed with it."""
        return Path("/dev/shm") / f"wattline-{hashlib.sha256(str(self.path).encode()).hexdigest()[:12]}"

    def prepare(self) -> None:
        """Make the folder, private to this user. Raises CommandError."""
        if len(str(self.path)) > MAX_PATH_CHARS:
            raise CommandError(
                f"runtime_dir: {str(self.path)!r} is {len(str(self.path))} characters long; sockets below it "
                f"leave {MAX_PATH_CHARS}; choose a shorter one, such as /tmp/wattline"
            )
        _make_private(self.path)

    def prepare_shared(self) -> None:
        """Make `shared_dir`. Anybody can make folders beside it, and guess its name. Raises CommandError."""
        _make_private(self.shared_dir)

    def acquire(self) -> None:
        """Be the only `up` in this folder. Raises CommandError naming the other one."""
        lock = (self.path / "up.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            state = read_state(self.path)
            owner = f"process {state.pid}" if state else "another process"
            raise CommandError(
                f"{owner} already runs `wattline up` in {self.path}; end it with `wattline down`, "
                "or set runtime_dir to another folder"
            ) from error
        self._lock = lock

    def release(self) -> None:
        """Forget the run: state and sockets go, logs stay."""
        if self._lock:
            secrets = (self.token_path, self.secret_path)
            for left in (*self.path.glob("*.sock"), *self.path.glob("loading-*"), *secrets):
                left.unlink(missing_ok=True)
            self.state_path.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def write_state(self, state: UpState) -> None:
        """Replace the state file in one go, so that no reader sees half of it."""
        fresh = self.state_path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(state)), encoding="utf-8")
        fresh.replace(self.state_path)


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"runtime_dir: {path} cannot be made ({error.strerror}); choose another"
        ) from error
    if not _is_ours_alone(path):
        raise CommandError(
            f"runtime_dir: {path} is open to others; choose one of your own, or `chmod 700` it"
        )


def _is_ours_alone(path: Path) -> bool:
    """Nobody else writes there. Raises OSError where there is no such folder."""
    about = path.stat()
    return about.st_uid == os.getuid() and not stat.S_IMODE(about.st_mode) & 0o022


def read_state(path: Path) -> UpState | None:
    """The state of the `up` that runs in this folder; None: there is none, or others could have written it.

    Who makes the default folder first could else be sent our prompts and keys, and say what `down` ends.
    """
    try:
        if not _is_ours_alone(path):
            return None
        state = UpState(**json.loads((path / "up.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return state if state.process() else None


def last_words(log_path: Path, *, max_chars: int = 600) -> str:
    """The last line of a log: where a process ended badly, it says why."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log_path.stat().st_size - 8192))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:max_chars] for line in reversed(lines) if line.strip()), "")
