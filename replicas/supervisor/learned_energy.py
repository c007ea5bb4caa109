"""What a group learned of its device's energy, kept in the runtime folder for its next life.

One small file per model, device, precision and layout. It only shortens learning: an unreadable file is as
good as none.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

from replicas.config import ReplicaConfig
from replicas.energy.learning import LearnedFactors
from replicas.request import EngineReady

logger = logging.getLogger(__name__)


class LearnedFile:
    """Read once when a group begins, written once when it ends."""

    def __init__(self, config: ReplicaConfig, engine: EngineReady) -> None:
        parallel = config.parallel
        device = engine.device.partition(":")[0]
        self._key = "/".join(
            (
                *(config.source, engine.weights_digest, device, engine.dtype, engine.quantization),
                *(engine.kernels, config.meter, f"tp{parallel.tensor}", f"ep{parallel.expert}"),
            )
        )
        digest = blake2b(self._key.encode(), digest_size=8).hexdigest()
        self.path = Path(config.runtime_dir) / f"wl-energy-{digest}.json"

    def read(self) -> LearnedFactors | None:
        """None if nothing was learned yet, or the file is not ours."""
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["key"] != self._key:
                return None
            time, flop, octet = (float(one) for one in saved["factors"])
            return LearnedFactors(factors=(time, flop, octet), num_windows=int(saved["num_windows"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("learned_energy_unreadable path=%s error=%r", self.path, error)
            return None

    def write(self, learned: LearnedFactors) -> None:
        """Replace the file as a whole. A full or missing folder costs only the next life's head start."""
        if not learned.num_windows:
            return
        part = self.path.with_suffix(f".{os.getpid()}")
        try:
            part.write_text(json.dumps({"key": self._key, **asdict(learned)}), encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            logger.warning("learned_energy_not_kept path=%s error=%r", self.path, error)
