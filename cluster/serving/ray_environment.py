"""What Ray reads from the environment: some of it at import, so this runs before, and imports no Ray.

A Ray of our own is guarded by a token made for it: its daemons listen on every interface, and whoever can
talk to them can run code.
"""

from __future__ import annotations

import os
import secrets
import sys

from cluster.config import Config
from cluster.serving.ray_chores import RAY_CHORES
from cluster.serving.run_folder import RunFolder

SERVE_ENVIRONMENT = {
    # Serve would run a replica on a second event loop, and grpc.aio serves one loop per process.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}


def missing_environment() -> dict[str, str]:
    """What replicas need and do not inherit. Empty in a Ray whose nodes have it, as one of our own does:
    a replica then takes a process that waits, which saves a second at every start."""
    return {name: value for name, value in SERVE_ENVIRONMENT.items() if os.environ.get(name) != value}


def settle_ray_environment(config: Config, folder: RunFolder) -> None:
    """Called once by `up`, before the first import of Ray."""
    assert "ray" not in sys.modules, "Ray has read its environment already"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray tells every driver, at length, of each worker that ends; it is in Ray's logs too.
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "^"
    is_owner = not config.ray.address
    mode: str = config.ray.auth_mode
    if mode == "auto":
        mode = "token" if is_owner else os.environ.get("RAY_AUTH_MODE", "disabled")
    os.environ["RAY_AUTH_MODE"] = mode
    if is_owner:
        os.environ.pop("RAY_ADDRESS", None)
        os.environ.update(SERVE_ENVIRONMENT)
        os.environ.update({name: value for name, value in RAY_CHORES.items() if name not in os.environ})
    if is_owner and mode == "token":
        folder.token_path.unlink(missing_ok=True)
        folder.token_path.touch(mode=0o600)
        folder.token_path.write_text(secrets.token_hex(32), encoding="utf-8")
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder.token_path)
