"""Which sums are small."""

from __future__ import annotations

import pytest
import torch

from replicas.parallel.one_shot import MAX_BYTES, is_small


@pytest.mark.parametrize(
    ("shape", "dtype", "wanted"),
    [
        ((1, 2048), torch.bfloat16, True),
        ((64, 2048), torch.bfloat16, True),
        ((65, 2048), torch.bfloat16, False),
        ((MAX_BYTES // 4,), torch.float32, True),
        ((MAX_BYTES // 4 + 4,), torch.float32, False),
        ((7,), torch.bfloat16, False),
        ((0,), torch.float32, False),
        ((16,), torch.float16, False),
        ((16,), torch.int64, False),
    ],
)
def test_a_sum_is_small_if_the_kernel_takes_it(
    shape: tuple[int, ...], dtype: torch.dtype, wanted: bool
) -> None:
    assert is_small(torch.empty(shape, dtype=dtype, device="meta")) is wanted
