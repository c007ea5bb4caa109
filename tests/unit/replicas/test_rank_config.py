"""A rank's config crosses a process boundary as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from replicas.config import (
    EngineLimits,
    NullEngineConfig,
    ParallelConfig,
    RankConfig,
    Rendezvous,
    lookahead_on,
    rank_config_from_json,
    rank_config_to_json,
)
from replicas.errors import BadKernels
from replicas.models.config_file import read_spec
from tests.demo_corpus import EXAMPLES_DIR

CONFIG = RankConfig(
    group="llama-0",
    epoch=4,
    rank=1,
    source="null",
    parallel=ParallelConfig(tensor=2, expert=2),
    limits=EngineLimits(max_sequences=3, lookahead=1),
    null=NullEngineConfig(step_ms=1.5, eos_every=9),
    socket_path="/run/rank0.sock",
)


def test_survives_the_round_trip() -> None:
    assert rank_config_from_json(rank_config_to_json(CONFIG)) == CONFIG


def test_a_spec_survives_it_too() -> None:
    spec = read_spec(EXAMPLES_DIR / "models" / "granite-moe-demo")
    config = replace(CONFIG, source="granite-moe-demo", spec=spec)
    assert rank_config_from_json(rank_config_to_json(config)) == config


def test_a_rank_over_hosts_survives_it_and_only_rank_0_has_the_listeners() -> None:
    meeting = Rendezvous(host="10.0.0.7", plan_port=5, store_port=6, plan_fd=3, store_fd=4)
    parallel = ParallelConfig(tensor=4, hosts=2)
    first, second = (
        replace(CONFIG, parallel=parallel, rank=rank, rendezvous=meeting.told_to(rank)) for rank in (0, 3)
    )
    assert rank_config_from_json(rank_config_to_json(first)).rendezvous == meeting
    told = rank_config_from_json(rank_config_to_json(second))
    assert told.rendezvous == Rendezvous(host="10.0.0.7", plan_port=5, store_port=6)
    assert (first.local_rank, told.local_rank) == (0, 1)


def test_an_unknown_key_is_named() -> None:
    fields = json.loads(rank_config_to_json(CONFIG))
    fields["limits"]["max_sequence"] = 3
    with pytest.raises(TypeError, match="max_sequence"):
        rank_config_from_json(json.dumps(fields))


def test_a_gpu_plans_one_step_ahead() -> None:
    assert [lookahead_on(device) for device in ("cpu", "cuda", "cuda:1")] == [0, 1, 1]


def test_an_attention_that_can_never_be_is_refused_before_a_rank_starts() -> None:
    with pytest.raises(BadKernels, match="attention is 'varlen', but device is 'cpu'"):
        replace(CONFIG, attention="varlen")
    limits = replace(CONFIG.limits, block_tokens=256)
    assert replace(CONFIG, attention="varlen", device="cuda", limits=limits).attention == "varlen"
