"""The UUID of a GPU, which meters and ranks go by. The number Ray uses depends on who looks."""

from __future__ import annotations

import pynvml

UUID_PREFIXES = ("GPU-", "MIG-")


def gpu_uuid(gpu_id: str) -> str:
    """The UUID behind what Ray calls a GPU: its number on this host, or already a UUID."""
    if gpu_id.startswith(UUID_PREFIXES):
        return gpu_id
    pynvml.nvmlInit()
    try:
        uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(int(gpu_id)))
    finally:
        pynvml.nvmlShutdown()
    return uuid.decode() if isinstance(uuid, bytes) else str(uuid)
