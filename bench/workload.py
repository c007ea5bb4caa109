"""Seeded workloads: which prompts, how long, how many at once. Pure, standard library only."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

MIX_TOKENS_MIN, MIX_TOKENS_MAX = 16, 256
PREFIX_TOKENS = 512
TAIL_TOKENS_MIN, TAIL_TOKENS_MAX = 16, 64
DECODE_PROMPT_TOKENS = 64
LONG_TOKENS_MIN, LONG_TOKENS_MAX = 2048, 4000
LONG_OUTPUT_TOKENS = 8
LONG_DECODE_FACTOR = 4
"""A decode stream under long prompts runs this many times longer than a stream of the other workloads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatePrompt:
    """A request that arrives once the streams of the closed loop have `after_output_tokens` between them."""

    after_output_tokens: int
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`prompts` are token ids; each asks for `output_tokens` with the end of sequence ignored.

    `late` prompts come on top of the closed loop of `concurrency` streams.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    output_tokens: int
    concurrency: int
    late: tuple[LatePrompt, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts)) + sum(len(one.prompt) for one in self.late)

    @property
    def total_output_tokens(self) -> int:
        return len(self.prompts) * self.output_tokens + sum(one.output_tokens for one in self.late)

    @property
    def context_tokens(self) -> int:
        """The longest prompt with its answer."""
        return max(
            *(len(prompt) + self.output_tokens for prompt in self.prompts),
            *(len(one.prompt) + one.output_tokens for one in self.late),
            0,
        )

    @property
    def undisturbed(self) -> Workload:
        return replace(self, late=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One workload at one concurrency."""

    workload: str
    concurrency: int

    @property
    def is_throughput(self) -> bool:
        """Whether its rate counts in the geometric mean; long prompts are about latency."""
        return self.workload != "long"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a workload must know of a model. `context_tokens` bounds prompt plus answer."""

    vocab_size: int
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What a workload is drawn from; equal draws give equal prompts."""

    model: ModelShape
    concurrency: int
    num_requests: int
    output_tokens: int
    seed: int


def mix(draw: Draw) -> Workload:
    """Prompts of log-uniform length in 16..256 tokens: many short, a few long."""
    lengths, ids = random.Random(f"lengths-{draw.seed}"), random.Random(f"ids-{draw.seed}-{draw.concurrency}")
    ratio = MIX_TOKENS_MAX / MIX_TOKENS_MIN
    return _workload(
        draw,
        "mix",
        [
            _tokens(ids, draw, round(MIX_TOKENS_MIN * ratio ** lengths.random()))
            for _ in range(draw.num_requests)
        ],
    )


def prefix(draw: Draw) -> Workload:
    """Prompts that share their first 512 tokens, with a tail of 16..64 of their own."""
    ids = random.Random(f"prefix-{draw.seed}-{draw.concurrency}")
    head = _tokens(ids, draw, PREFIX_TOKENS)
    tails = [
        _tokens(ids, draw, ids.randint(TAIL_TOKENS_MIN, TAIL_TOKENS_MAX)) for _ in range(draw.num_requests)
    ]
    return _workload(draw, "prefix", [head + tail for tail in tails])


def long(draw: Draw) -> Workload:
    """Decode streams of short prompts; in each wave of them one prompt of 2-4k tokens arrives.

    The streams run in waves of `concurrency`; a quarter into each wave one long prompt comes on top. Its
    length goes evenly from 2048 to 4000 tokens over the waves, or to what the model's context allows.
    """
    ids = random.Random(f"long-{draw.seed}-{draw.concurrency}")
    output_tokens = draw.output_tokens * LONG_DECODE_FACTOR
    num_waves = max(1, draw.num_requests // draw.concurrency)
    most = min(LONG_TOKENS_MAX, draw.model.context_tokens - LONG_OUTPUT_TOKENS)
    least = min(LONG_TOKENS_MIN, most)
    streams = [_tokens(ids, draw, DECODE_PROMPT_TOKENS) for _ in range(num_waves * draw.concurrency)]
    late = tuple(
        LatePrompt(
            after_output_tokens=round((wave + 0.25) * output_tokens * draw.concurrency),
            prompt=_tokens(ids, draw, least + (most - least) * wave // max(1, num_waves - 1)),
            output_tokens=LONG_OUTPUT_TOKENS,
        )
        for wave in range(num_waves)
    )
    workload = _workload(replace(draw, output_tokens=output_tokens), "long", streams)
    return replace(workload, late=late)


WORKLOADS: dict[str, Callable[[Draw], Workload]] = {"mix": mix, "prefix": prefix, "long": long}


def workload_to_dict(workload: Workload) -> dict[str, Any]:
    return asdict(workload)


def workload_from_dict(fields: dict[str, Any]) -> Workload:
    """The inverse of `workload_to_dict`, also after JSON made lists of its tuples."""
    late = tuple(LatePrompt(**one | {"prompt": tuple(one["prompt"])}) for one in fields["late"])
    return Workload(**fields | {"prompts": tuple(map(tuple, fields["prompts"])), "late": late})


def _tokens(ids: random.Random, draw: Draw, count: int) -> tuple[int, ...]:
    return tuple(ids.randrange(draw.model.vocab_size // 8, draw.model.vocab_size) for _ in range(count))


def _workload(draw: Draw, name: str, prompts: list[tuple[int, ...]]) -> Workload:
    """Raises ValueError when a request is longer than the model's context."""
    workload = Workload(
        name=name,
        prompts=tuple(prompts),
        output_tokens=draw.output_tokens,
        concurrency=draw.concurrency,
    )
    if workload.context_tokens > draw.model.context_tokens:
        raise ValueError(
            f"workload {name} asks for {workload.context_tokens} tokens of context; the model has "
            f"{draw.model.context_tokens}: fewer output tokens, another workload or another model"
        )
    return workload
