"""Every pair the demonstration models know, by one rank and by expert-parallel ranks with whole attention.

`test_demo_line.py` does the same through gRPC with two tensor-parallel ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.request.completion import Turn
from cluster.text.tokenizers import CheckpointTokenizer
from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.frames import Shutdown, Submit
from replicas.models.config_file import read_spec
from replicas.request import FinishReason, GenerationRequest
from tests.demo_corpus import EXAMPLES_DIR, read_pairs
from tests.live_ranks import open_group

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ("llama-demo", ParallelConfig()),
        ("granite-moe-demo", ParallelConfig()),
        ("granite-moe-demo", ParallelConfig(expert=2)),
    ],
    ids=("llama-1", "granite-1", "granite-ep2"),
)
async def test_every_pair_is_answered_exactly(tmp_path: Path, model: str, parallel: ParallelConfig) -> None:
    source = EXAMPLES_DIR / "models" / model
    tokenizer = CheckpointTokenizer(source)
    pairs = read_pairs()
    prompts = [
        tokenizer.encode_chat([Turn(role=role, content=content) for role, content in pair.messages])
        for pair in pairs
    ]
    config = RankConfig(
        group=model,
        epoch=1,
        rank=0,
        source=str(source),
        parallel=parallel,
        limits=EngineLimits(max_sequences=32, num_blocks=400),
        socket_path=str(tmp_path / "rank0.sock"),
        shared_dir=str(tmp_path),
        spec=read_spec(source),
    )
    async with open_group(config) as group:
        ready = await group.read_ready()
        for index, prompt in enumerate(prompts):
            request = GenerationRequest(
                request_id=index,
                prompt_ids=prompt,
                max_tokens=200,
                stop_token_ids=frozenset(ready.eos_token_ids),
            )
            await group.send(Submit(request=request))
        await group.read_until(lambda live: len(live.finishes) == len(prompts))
        await group.send(Shutdown())
    assert set(group.finishes.values()) == {FinishReason.STOP}
    answers = [tokenizer.decode(group.tokens[index][:-1]) for index in range(len(pairs))]
    assert answers == [pair.assistant for pair in pairs]
