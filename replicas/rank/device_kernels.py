"""The Triton kernels of a CUDA device, imported only where they can run.

Whoever has no Triton (a CPU, or a PyTorch without it) runs the torch leaves instead; this file is the one
that decides. Called once, while a rank is built.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replicas.rank.sampler import BestTokens

if TYPE_CHECKING:  # Needs Triton.
    from replicas.layers.triton.layers import DeviceLayers

logger = logging.getLogger(__name__)

TRITON_KERNELS = "triton"
VARLEN_KERNELS = "triton+varlen"
"""What the screens call them; the second, where torch has a part of the attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKernels:
    """`layers` makes the decoder layers of a rank; `best_tokens` draws from its logits."""

    layers: type[DeviceLayers]
    best_tokens: BestTokens


def load_device_kernels() -> DeviceKernels | None:
    """None, with a line in the log, where Triton is missing or cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        logger.warning("device_kernels_off reason=triton is not installed; torch computes, without graphs")
        return None
    try:
        layers = importlib.import_module("replicas.layers.triton.layers")
        sample = importlib.import_module("replicas.layers.triton.sample")
    except (ImportError, RuntimeError) as error:
        logger.warning("device_kernels_off reason=%s; torch computes, without graphs", error)
        return None
    return DeviceKernels(layers=layers.DeviceLayers, best_tokens=sample.best_tokens)
