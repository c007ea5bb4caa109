"""Root-mean-square norm. Shape letters: T tokens, H hidden."""

from __future__ import annotations

import torch
from torch.nn import functional


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale every row to unit mean square, then by `weight_H`; computed in float32, returned in x's dtype."""
    return functional.rms_norm(x_TH, weight_H.shape, weight_H, eps)
