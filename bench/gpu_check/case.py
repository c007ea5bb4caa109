"""A kernel case: one launch, its float64 reference in plain torch, and what it must move and multiply.

The tests run the tiny cases (in Triton's interpreter where there is no GPU); the GPU check runs both sizes on
the device and times the large ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]

_FAR_BEYOND_CACHE_BYTES = 256 * 2**20

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Largest error, in units of the reference's own largest value: a few roundings of the dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """`launch` is what is timed; `results` runs on fresh inputs and is compared with `reference`."""

    kernel: str
    shape: str
    dtype: torch.dtype
    launch: Callable[[], object]
    results: Callable[[], Tensors]
    reference: Callable[[], Tensors]
    num_bytes: int = 0
    num_flops: int = 0

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    def error(self) -> float:
        """Largest error relative to the largest reference value, over all results; integers must be equal."""
        worst = 0.0
        for mine, exact in zip(self.results(), self.reference(), strict=True):
            if not exact.is_floating_point():
                worst = max(worst, 0.0 if torch.equal(mine.to(exact.dtype), exact) else float("inf"))
                continue
            if not exact.numel():
                continue
            scale = exact.abs().max().clamp(min=1e-30)
            error = ((mine.double() - exact).abs().max() / scale).item()
            worst = max(worst, error if error == error else float("inf"))
        return worst

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, seed: int = 0, scale: float = 1.0
) -> torch.Tensor:
    """Normal numbers, drawn on the device: large inputs are not copied there."""
    generator = torch.Generator(device=device).manual_seed(seed + sum(shape))
    drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    return drawn.mul_(scale).to(dtype)


def rotated(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Equal weights without end: so many that a GPU finds none in its cache when its turn comes again."""
    size = weight.numel() * weight.element_size()
    count = 1 if weight.device.type == "cpu" else max(1, -(-_FAR_BEYOND_CACHE_BYTES // size))
    return itertools.cycle([weight, *(weight.clone() for _ in range(count - 1))])


def size_bytes(*tensors: torch.Tensor) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)
