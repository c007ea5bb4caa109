"""Seeded workloads: which prompts, how long, how many at once. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

MIX_TOKENS_MIN, MIX_TOKENS_MAX = 16, 256
PREFIX_TOKENS = 512
TAIL_TOKENS_MIN, TAIL_TOKENS_MAX = 16, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`prompts` are token ids; each asks for `output_tokens` with the end of sequence ignored."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    output_tokens: int
    concurrency: int

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


def mix(*, concurrency: int, vocab_size: int, num_requests: int, output_tokens: int, seed: int) -> Workload:
    """Prompts of log-uniform length in 16..256 tokens: many short, a few long."""
    lengths, ids = random.Random(f"lengths-{seed}"), random.Random(f"ids-{seed}-{concurrency}")
    ratio = MIX_TOKENS_MAX / MIX_TOKENS_MIN
    prompts = tuple(
        tuple(
            ids.randrange(vocab_size // 8, vocab_size)
            for _ in range(round(MIX_TOKENS_MIN * ratio ** lengths.random()))
        )
        for _ in range(num_requests)
    )
    return Workload(name="mix", prompts=prompts, output_tokens=output_tokens, concurrency=concurrency)


def prefix(
    *, concurrency: int, vocab_size: int, num_requests: int, output_tokens: int, seed: int
) -> Workload:
    """Prompts that share their first 512 tokens, with a tail of 16..64 of their own."""
    ids = random.Random(f"prefix-{seed}-{concurrency}")

    def draw(count: int) -> tuple[int, ...]:
        return tuple(ids.randrange(vocab_size // 8, vocab_size) for _ in range(count))

    head = draw(PREFIX_TOKENS)
    prompts = tuple(head + draw(ids.randint(TAIL_TOKENS_MIN, TAIL_TOKENS_MAX)) for _ in range(num_requests))
    return Workload(name="prefix", prompts=prompts, output_tokens=output_tokens, concurrency=concurrency)


WORKLOADS = {"mix": mix, "prefix": prefix}
