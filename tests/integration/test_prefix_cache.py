"""A model reads the KV that another sequence left, and gives the tokens it gives without a cache.

Penalties are in the mix: their counts must be right, too, for tokens that nobody computed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replicas.config import EngineLimits, ParallelConfig
from replicas.engine.engine import Engine
from replicas.engine.scheduler import Scheduler
from replicas.parallel.collectives import SoloCollectives
from replicas.plan import EngineShape
from replicas.rank.runner import ModelRunner
from replicas.request import GenerationRequest, SamplingParams
from tests.checkpoints import make_granite_moe, make_llama
from tests.rank_threads import make_rank_config

LIMITS = EngineLimits(
    max_sequences=4, step_tokens=32, block_tokens=8, num_blocks=40, context_tokens=128, lookahead=0
)
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9, seed=7),
    SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.3),
)


def make_requests() -> list[GenerationRequest]:
    """A shared beginning of 50 tokens with tails of many lengths, some of them twice."""
    torch.manual_seed(0)
    beginning = tuple(torch.randint(3, 500, (50,)).tolist())
    tails = [tuple(torch.randint(3, 500, (length,)).tolist()) for length in (1, 7, 14, 15, 30)]
    return [
        GenerationRequest(
            request_id=index + 1,
            prompt_ids=beginning + tail,
            max_tokens=12,
            sampling=SAMPLINGS[index % len(SAMPLINGS)],
        )
        for index, tail in enumerate([*tails, *tails])
    ]


def answers(source: Path, limits: EngineLimits, kernels: str) -> tuple[dict[int, list[int]], int]:
    """The tokens per request, and how many prompt tokens were found in the cache."""
    config = make_rank_config(
        source.parent, rank=0, parallel=ParallelConfig(), source=str(source), limits=limits
    )
    config = replace(config, kernels=kernels)
    runner = ModelRunner.build(config, SoloCollectives(), lambda stage, done, total: None)
    shape = EngineShape(
        architecture="",
        vocab_size=runner.spec.vocab_size,
        context_tokens=runner.context_tokens,
        num_blocks=runner.num_blocks,
        eos_token_ids=(),
        weights_digest=runner.weights_digest,
        dtype=runner.dtype,
        device=runner.device,
        costs=runner.costs,
    )
    engine = Engine(runner, Scheduler(limits, shape))
    tokens: dict[int, list[int]] = {}
    for request in make_requests():
        engine.submit(request)
    while engine.has_work:
        for delta in engine.step().deltas:
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    return tokens, engine.load.cached_tokens_total


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("make", [make_llama, make_granite_moe])
@pytest.mark.parametrize(("num_blocks", "step_tokens"), [(40, 32), (17, 32), (80, 256)])
def test_tokens_are_the_same_with_and_without_the_cache(
    tmp_path: Path, make: object, num_blocks: int, step_tokens: int, kernels: str
) -> None:
    """In the last case sequences read what others of the same step write."""
    torch.set_num_threads(1)
    assert callable(make)
    source = make(tmp_path / "model", seed=10)
    limits = replace(LIMITS, num_blocks=num_blocks, step_tokens=step_tokens)
    with_cache, num_cached = answers(source, limits, kernels)
    without, num_none = answers(source, replace(limits, prefix_caching=False), kernels)
    assert with_cache == without
    assert num_none == 0 and num_cached >= 7 * 48
