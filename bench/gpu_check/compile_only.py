"""`python -m bench.gpu_check.compile_only`: compile every kernel for Hopper on a machine that has no GPU.

Triton's compiler needs the target, not the device. What the interpreter cannot see shows here: types,
layouts, shared memory. A line per kernel; fails where one does not compile or needs more than a block has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.gpu_check.attention_cases import decode_case, prefill_case
from bench.gpu_check.cases import GRANITE, LLAMA_8B
from bench.gpu_check.layer_cases import add_norm_case, best_token_case, rope_case, swiglu_case
from replicas.layers.triton import decode_attention, token_tiles
from replicas.layers.triton.combine import combine_experts
from replicas.layers.triton.expert_lists import list_pairs
from replicas.layers.triton.grouped_linear import PairLists, down_experts, gated_experts
from replicas.layers.triton.router import choose_experts
from replicas.layers.triton.token_add import add_product
from replicas.layers.triton.token_gated import norm_gated
from replicas.layers.triton.token_linear import norm_linear
from replicas.layers.triton.token_router import norm_router

HOPPER = GPUTarget("cuda", 90, 32)
HOPPER_PROCESSORS = 132
SHARED_BYTES = 227 * 1024
"""What one block may have on H100 and H200."""
_CPU = torch.device("cpu")


class HopperDriver:
    """Tells Triton that the current device is a Hopper; nothing can be launched on it."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return _CPU


def compile_all() -> Iterator[tuple[str, int]]:
    """(kernel, bytes of shared memory) of every kernel, in bfloat16 and served shapes."""
    compiled: list[tuple[str, int]] = []

    def compile_instead(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            built = kernel.run(*arguments, grid=grid, warmup=True, **options)
            compiled.append((kernel.__name__, built.metadata.shared))

        return launch

    driver.set_active(HopperDriver())
    JITFunction.__getitem__ = compile_instead
    # Contexts are split for the processors of a Hopper, not for those of this machine.
    with (
        patch.object(decode_attention, "num_processors", return_value=HOPPER_PROCESSORS),
        patch.object(token_tiles, "num_processors", return_value=HOPPER_PROCESSORS),
    ):
        for launch in _launches():
            launch()
            yield from compiled
            compiled.clear()


def _launches() -> Iterator[Callable[[], object]]:
    """Few and short sequences: shapes of tensors matter here, not what is in them."""
    bfloat16 = torch.bfloat16
    tiny: dict[str, Any] = {"dtype": bfloat16, "device": _CPU}
    for heads in (LLAMA_8B, GRANITE):
        yield decode_case(heads, (64,), max_context_tokens=16_384, **tiny).launch
    yield prefill_case(LLAMA_8B, ((0, 256),), **tiny).launch
    yield rope_case(3, LLAMA_8B, **tiny).launch
    yield add_norm_case(1, 4096, multiplier=1.0, **tiny).launch
    yield swiglu_case(1, 14_336, **tiny).launch
    yield best_token_case(2, 128_256, num_valid=128_256, device=_CPU).launch
    yield lambda: choose_experts(torch.zeros(1, 32, dtype=bfloat16), torch.ones(1, dtype=torch.int64), 8)
    for hidden, size, vocab in ((2048, 8192, 128_256), (4096, 14_336, 128_256), (1024, 512, 49_168)):
        yield partial(_launch_one_token, hidden, size, vocab)
    yield _launch_token_experts
    for tokens in (1, 2048):
        yield partial(_launch_experts, tokens)


def _launch_experts(tokens: int) -> None:
    """granite-3.0-1b-a400m; nothing is computed, so choices are what they are."""
    choices = torch.zeros(tokens, 8, dtype=torch.int32)
    counts = torch.zeros(32, dtype=torch.int32)
    pairs = list_pairs(choices, counts, first_expert=0, num_local=32)
    lists = PairLists(pairs_ET=pairs, counts_X=counts, first_expert=0, num_choices=8)
    x = torch.zeros(tokens, 1024, dtype=torch.bfloat16)
    hidden = gated_experts(x, torch.zeros(32, 1024, 1024, dtype=torch.bfloat16), lists)
    y = down_experts(hidden, torch.zeros(32, 1024, 512, dtype=torch.bfloat16), lists)
    combine_experts(y, choices, torch.zeros(tokens, 8), first_expert=0, num_local=32)


def _launch_one_token(hidden: int, size: int, vocab: int) -> None:
    """The products of a dense layer and the head; memory that is never touched costs nothing."""
    x, norm = _untouched(1, hidden), _untouched(hidden)
    norm_linear(x, norm, _untouched(vocab, hidden), eps=1e-5)
    norm_linear(x, norm, _untouched(3 * hidden // 2, hidden), eps=1e-5)
    inner = norm_gated(x, norm, _untouched(2 * size, hidden), eps=1e-5)
    add_product(x, inner, _untouched(hidden, size), multiplier=1.0)


def _launch_token_experts() -> None:
    """granite-3.0-1b-a400m."""
    x, norm, counts = _untouched(1, 1024), _untouched(1024), torch.zeros(32, dtype=torch.int32)
    choices, shares = norm_router(x, norm, _untouched(32, 1024), counts, num_choices=8, eps=1e-6)
    inner = norm_gated(x, norm, _untouched(32, 1024, 1024), eps=1e-6, choices_1C=choices)
    down = _untouched(32, 1024, 512)
    add_product(x, inner, down, multiplier=0.22, choices_1C=choices, shares_1C=shares)


def _untouched(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def main() -> int:
    is_right = True
    for kernel, shared_bytes in compile_all():
        is_right &= shared_bytes <= SHARED_BYTES
        print(f"{kernel:<20} {shared_bytes:>7} bytes of shared memory", flush=True)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
