"""The file of the agent's socket, before gRPC gets it."""

from __future__ import annotations

import socket
from pathlib import Path

_SOCKET_PATH_BYTES = 107


def check_socket_path(path: Path) -> None:
    """gRPC takes a socket file over in silence, also from a living agent; and it cuts long paths."""
    if len(bytes(path)) > _SOCKET_PATH_BYTES:
        raise ValueError(
            f"socket path {path} is longer than {_SOCKET_PATH_BYTES} bytes; use a shorter folder"
        )
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise OSError(f"an energy agent already listens on {path}; use it, or give --listen another path")
