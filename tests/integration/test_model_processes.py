"""Real models in real rank processes, scheduled by the engine: the tokens are those of transformers.

The ranks themselves cannot import transformers (`live_ranks.py`): what they know of a model, they are told.
The pool is too small for all requests at once, so some are preempted and computed again on the way.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.frames import Shutdown, Submit
from replicas.models.config_file import read_spec
from replicas.rank.process import GOLDEN_PROMPT_TOKENS, GOLDEN_TOKENS
from replicas.request import FinishReason, GenerationRequest
from tests.checkpoints import make_granite_moe, make_llama, reference_logits
from tests.live_ranks import open_group

pytestmark = pytest.mark.processes

NEAR_TIE = 1e-4
"""Of the logit scale: below it, which token is best is a matter of rounding."""
NUM_TOKENS = 24
PROMPTS = tuple(
    tuple(range(10 + 7 * index, 10 + 7 * index + length)) for index, length in enumerate((5, 30, 1, 17))
)


@pytest.mark.parametrize(
    ("name", "parallel", "lookahead"),
    [
        ("llama", ParallelConfig(tensor=1), 0),
        ("llama", ParallelConfig(tensor=2), 1),
        ("granite-moe", ParallelConfig(tensor=2, expert=2), 0),
        ("llama", ParallelConfig(tensor=4, hosts=2), 1),
        (
            "granite-moe",
            ParallelConfig(expert=2, layout="dispatch", spare_experts=2, rebalance_steps=6, hosts=2),
            0,
        ),
    ],
)
async def test_a_group_answers_like_transformers(
    tmp_path: Path, name: str, parallel: ParallelConfig, lookahead: int
) -> None:
    folder = tmp_path / "checkpoint"
    source = make_llama(folder, seed=10) if name == "llama" else make_granite_moe(folder, seed=13)
    limits = EngineLimits(
        max_sequences=4,
        step_tokens=16,
        block_tokens=8,
        num_blocks=15,
        context_tokens=100,
        lookahead=lookahead,
    )
    config = RankConfig(
        group=name,
        epoch=1,
        rank=0,
        source=str(source),
        parallel=parallel,
        limits=limits,
        socket_path=str(tmp_path / "rank0.sock"),
        shared_dir=str(tmp_path),
        spec=read_spec(source),
    )
    async with open_group(config) as group:
        ready = await group.read_ready()
        assert (ready.context_tokens, ready.dtype, ready.device) == (100, "float32", "cpu")
        assert ready.lanes == len(ready.load.free_blocks) == parallel.num_lanes
        assert (ready.kernels == "torch") == (shutil.which("cc") is None)
        requests = [
            GenerationRequest(
                request_id=request_id,
                prompt_ids=prompt_ids,
                max_tokens=NUM_TOKENS,
                lane=(0, 0, 1, 0)[request_id] % ready.lanes,
            )
            for request_id, prompt_ids in enumerate(PROMPTS)
        ]
        await group.send_together(*(Submit(request=request) for request in requests))
        await group.read_until(lambda seen: len(seen.finishes) == len(PROMPTS))
        if name == "granite-moe":
            num_golden = parallel.num_lanes * (GOLDEN_PROMPT_TOKENS + GOLDEN_TOKENS - 1)
            loads = await group.read_experts(2 * 2 * (num_golden + group.num_computed))
            assert (loads.num_experts, loads.num_layers, loads.num_ranks) == (8, 2, 2)
        await group.send(Shutdown())
        assert await group.exit_codes() == [0] * config.num_ranks
    assert set(group.finishes.values()) == {FinishReason.LENGTH}
    timings = [delta.timing for delta in group.last.values()]
    assert sum(timing.preemptions for timing in timings if timing) > 0
    answers = [[*prompt_ids, *group.tokens[index]] for index, prompt_ids in enumerate(PROMPTS)]
    for prompt_ids, answer, logits_TV in zip(
        PROMPTS, answers, reference_logits(source, answers), strict=True
    ):
        scale = logits_TV.abs().max()
        for pos in range(len(prompt_ids), len(answer)):
            best = logits_TV[pos - 1].max()
            assert logits_TV[pos - 1, answer[pos]] >= best - NEAR_TIE * scale
