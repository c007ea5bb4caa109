"""Where a router listens: the actual ports, and the error for a port that is taken."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.config import ConfigError


class PortInUse(ConfigError):
    """An address that cannot be bound."""

    def __init__(self, *, key: str, host: str, port: int) -> None:
        super().__init__(
            f"{key}: {host}:{port} cannot be bound, another program uses it or the host is not ours; "
            f"stop that program, or set {key} to another port (0 takes a free one)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterAddresses:
    """host:port of each server, and the process that has them.

    `metrics`: where this very process shows its pages, which is not `http` where several share that port.
    """

    router_id: str
    pid: int
    grpc: str
    link: str
    http: str
    metrics: str = ""

    def write(self, path: Path) -> None:
        """In one piece: whoever waits for the file never reads half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        scratch.replace(path)


def read_addresses(path: Path) -> RouterAddresses:
    """What `RouterAddresses.write` wrote. Raises OSError while there is no file."""
    return RouterAddresses(**json.loads(path.read_text(encoding="utf-8")))


def join_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
