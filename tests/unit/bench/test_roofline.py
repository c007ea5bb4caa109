"""The floors of a step against figures worked out by hand for an H100 (3.35 TB/s, 989 TFLOP/s)."""

from __future__ import annotations

import pytest

from bench.gpu_check.rates import Rates
from bench.gpu_check.roofline import decode_floor_s, prefill_floor_s
from bench.gpu_check.shapes import served_shapes, spec_of

H100 = Rates(read_b_s=3.35e12, copy_b_s=3e12, triad_b_s=3e12, matmul_flop_s=989e12)
SHAPES = {shape.name: spec_of(shape) for shape in served_shapes()}


@pytest.mark.parametrize(
    ("name", "batch", "experts_per_layer", "tokens_per_s"),
    [
        ("Llama-3.2-1B", 1, 0, 1_337),
        ("Llama-3.1-8B", 1, 0, 221),
        ("Llama-3.1-8B", 256, 0, 17_400),
        ("granite-3.0-1b-a400m", 1, 8, 3_691),
        ("granite-3.0-1b-a400m", 256, 32, 55_100),
    ],
)
def test_decode_tokens_per_second_at_the_floor(
    name: str, batch: int, experts_per_layer: int, tokens_per_s: float
) -> None:
    spec = SHAPES[name]
    floor_s = decode_floor_s(
        spec, H100, batch=batch, context=1024, experts_hit=experts_per_layer * spec.num_layers, itemsize=2
    )
    assert batch / floor_s == pytest.approx(tokens_per_s, rel=0.02)


def test_prefill_is_bound_by_products() -> None:
    floor_s = prefill_floor_s(SHAPES["Llama-3.1-8B"], H100, num_tokens=2048, itemsize=2)
    # 6.98 G parameters outside embedding and head, twice; 32 layers x 4096 x 2048^2 x 2 of attention.
    assert floor_s == pytest.approx((2 * 6.98e9 * 2048 + 1.1e12) / 989e12, rel=0.01)
