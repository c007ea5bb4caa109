"""Where a configuration's ledger is: its file, and the address of its store."""

from __future__ import annotations

from pathlib import Path

from cluster.config import Config

SOCKET_NAME = "ledger.sock"


def ledger_path(config: Config) -> Path:
    """The file of a configuration's ledger."""
    return Path(config.ledger.path) if config.ledger.path else Path(config.runtime_dir) / "ledger.db"


def ledger_address(config: Config) -> str:
    """Where a configuration's store listens, as a gRPC target."""
    return config.ledger.address or f"unix:{Path(config.runtime_dir) / SOCKET_NAME}"
