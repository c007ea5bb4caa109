"""Shards of a group cover a model exactly once; degrees that do not divide it are refused by factor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.errors import BadParallelism
from replicas.models.costs import costs_of
from replicas.models.spec import ModelSpec, RopeSpec
from replicas.parallel.degrees import Shard, shard_of
from replicas.request import EngineCosts

MOE = ModelSpec(
    architecture="GraniteMoeForCausalLM",
    vocab_size=49155,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=32,
    num_experts=8,
    experts_per_token=2,
    norm_eps=1e-6,
    rope=RopeSpec(theta=10_000.0),
    is_head_tied=True,
    context_tokens=512,
    eos_token_ids=(2,),
    attention_scale=0.1,
)
DENSE = replace(MOE, architecture="LlamaForCausalLM", num_experts=0, experts_per_token=0)


def shards(spec: ModelSpec, tensor: int, expert: int) -> list[Shard]:
    parallel = ParallelConfig(tensor=tensor, expert=expert)
    return [shard_of(spec, parallel, rank) for rank in range(parallel.num_ranks)]


def test_kv_heads_are_shared_when_there_are_more_ranks() -> None:
    four = shards(MOE, 4, 1)
    assert [(shard.head_start, shard.num_heads) for shard in four] == [(0, 2), (2, 2), (4, 2), (6, 2)]
    assert [(shard.kv_head_start, shard.num_kv_heads) for shard in four] == [(0, 1), (0, 1), (1, 1), (1, 1)]


def test_expert_ranks_alone_replicate_attention() -> None:
    for rank, shard in enumerate(shards(MOE, 1, 2)):
        assert (shard.num_heads, shard.num_kv_heads, shard.is_attention_split) == (8, 2, False)
        assert (shard.expert_start, shard.num_experts, shard.ffn_size) == (4 * rank, 4, 32)
        assert shard.is_ffn_split


def test_dispatch_splits_experts_and_nothing_else() -> None:
    parallel = ParallelConfig(expert=2, layout="dispatch")
    for rank in range(2):
        shard = shard_of(MOE, parallel, rank)
        assert (shard.rank, shard.expert_start, shard.num_experts) == (rank, 4 * rank, 4)
        assert (shard.num_heads, shard.num_kv_heads, shard.ffn_size) == (8, 2, 32)
        assert (shard.vocab_start, shard.vocab_valid, shard.vocab_ranks) == (0, 49155, 1)
        assert (shard.is_attention_split, shard.is_ffn_split, shard.is_dispatched) == (False, False, True)
    with pytest.raises(BadParallelism, match="has no experts; set expert=1, layout=shared"):
        shard_of(DENSE, parallel, 0)


@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (2, 2)])
def test_dispatch_over_anything_but_experts_is_refused(degrees: tuple[int, int]) -> None:
    with pytest.raises(BadParallelism, match="set tensor to 1 and expert to the number of ranks"):
        ParallelConfig(tensor=degrees[0], expert=degrees[1], layout="dispatch")


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(expert=2, layout="dispatch"), ParallelConfig(expert=2, spare_experts=1)]
)
def test_lanes_and_spare_experts_are_refused_on_a_gpu(parallel: ParallelConfig) -> None:
    with pytest.raises(BadParallelism, match="run on CPU ranks only; set layout to shared"):
        RankConfig(
            group="g", epoch=1, rank=0, source="", parallel=parallel, limits=EngineLimits(), device="cuda"
        )


def test_tensor_ranks_alone_split_every_expert() -> None:
    for rank, shard in enumerate(shards(MOE, 2, 1)):
        assert (shard.expert_start, shard.num_experts) == (0, 8)
        assert (shard.ffn_start, shard.ffn_size) == (16 * rank, 16)


@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (1, 4), (4, 4)])
@pytest.mark.parametrize("vocab_size", [5, 515, 49155])
def test_the_vocabulary_is_covered_once(degrees: tuple[int, int], vocab_size: int) -> None:
    group = shards(replace(MOE, vocab_size=vocab_size), *degrees)
    assert sum(shard.vocab_valid for shard in group) == vocab_size
    assert len({shard.vocab_rows for shard in group}) == 1
    assert [shard.vocab_start for shard in group] == [
        rank * group[0].vocab_rows for rank in range(len(group))
    ]


def test_every_problem_is_named() -> None:
    with pytest.raises(BadParallelism) as caught:
        shards(replace(MOE, num_experts=9, experts_per_token=2), 3, 3)
    text = str(caught.value)
    assert "num_heads=8 % tensor=3 = 2" in text
    assert "num_kv_heads=2 and tensor=3" in text
    with pytest.raises(BadParallelism, match="num_experts=8 % expert=3 = 2"):
        shards(MOE, 1, 3)
    with pytest.raises(BadParallelism, match="has no experts; set expert=1"):
        shards(DENSE, 1, 2)
    with pytest.raises(BadParallelism, match="ffn_size=30 % tensor=4 = 2"):
        shards(replace(DENSE, ffn_size=30), 4, 1)


def costs(parallel: ParallelConfig, weight_bytes: float = 4) -> EngineCosts:
    return costs_of(MOE, parallel, weight_bytes=weight_bytes, kv_bytes=4)


def test_costs_count_what_ranks_repeat() -> None:
    solo = costs(ParallelConfig())
    attention, expert, router, norms = 64 * (2 * 64 + 2 * 16), 3 * 64 * 32, 64 * 8, 2 * 64
    head = 64 * 49155
    assert solo.active_params == 2 * (attention + router + norms + 2 * expert) + head
    assert solo.shared_weight_bytes == 4 * (2 * (attention + router + norms) + head)
    assert (solo.expert_bytes, solo.attention_dim, solo.num_layers) == (4 * expert, 64, 2)
    assert solo.kv_bytes_per_token == 2 * 2 * 16 * 4
    assert costs(ParallelConfig(expert=2)).kv_bytes_per_token == 2 * solo.kv_bytes_per_token
    assert costs(ParallelConfig(tensor=2)).kv_bytes_per_token == solo.kv_bytes_per_token
    assert costs(ParallelConfig(tensor=4)).kv_bytes_per_token == 2 * solo.kv_bytes_per_token


def test_dispatch_computes_a_token_once_and_reads_the_weights_per_rank() -> None:
    solo, two = costs(ParallelConfig()), costs(ParallelConfig(expert=2, layout="dispatch"))
    router, norms = 2 * 64 * 8, 2 * 2 * 64
    assert two.active_params == solo.active_params + router + norms
    assert two.shared_weight_bytes == 2 * solo.shared_weight_bytes
    assert (two.kv_bytes_per_token, two.expert_bytes) == (solo.kv_bytes_per_token, solo.expert_bytes)


def test_spare_slots_hold_at_most_all_but_one_of_the_others() -> None:
    most = ParallelConfig(expert=2, spare_experts=3)
    assert shard_of(MOE, most, 1).num_spare_experts == 3
    with pytest.raises(BadParallelism, match="spare_experts=4; at most 3"):
        shard_of(MOE, ParallelConfig(expert=2, spare_experts=4), 0)
    with pytest.raises(BadParallelism, match="0 where expert is 1"):
        ParallelConfig(spare_experts=1)


def test_smaller_weights_are_fewer_bytes_and_the_same_arithmetic() -> None:
    whole, small = costs(ParallelConfig()), costs(ParallelConfig(), 1.25)
    assert small.active_params == whole.active_params
    assert small.shared_weight_bytes * 16 == whole.shared_weight_bytes * 5
    assert small.expert_bytes * 16 == whole.expert_bytes * 5
    assert small.kv_bytes_per_token == whole.kv_bytes_per_token
