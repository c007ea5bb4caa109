"""The names a replica's group goes by on its host, and the removal of what a killed group left behind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from replicas.config import ReplicaConfig

NAME_CHARS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFiles:
    """Derived from replica id and epoch alone, so two replicas on one host never meet.

    `group` is safe in file names. Example: `llama/a1` becomes `llama-a1-3f9c2b7d`, and the files of its ranks
    in `shared_dir` begin with that and a dot.
    """

    runtime_dir: Path
    shared_dir: Path
    group: str
    epoch: int

    @classmethod
    def of(cls, config: ReplicaConfig, *, epoch: int) -> GroupFiles:
        readable = re.sub(r"[^A-Za-z0-9]+", "-", config.replica_id)[:NAME_CHARS].strip("-")
        return cls(
            runtime_dir=Path(config.runtime_dir),
            shared_dir=Path(config.shared_dir),
            group=f"{readable}-{_short_digest(config.replica_id)}",
            epoch=epoch,
        )

    @property
    def socket_path(self) -> Path:
        """Short, because the kernel allows 107 bytes."""
        return self.runtime_dir / f"wl-{_short_digest(f'{self.group}/{self.epoch}')}.sock"

    def remove_shared(self) -> None:
        """Ranks unlink their shared files once attached; ranks killed before that leave them."""
        for path in self.shared_dir.glob(f"{self.group}.*"):
            path.unlink(missing_ok=True)


def _short_digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=4).hexdigest()
