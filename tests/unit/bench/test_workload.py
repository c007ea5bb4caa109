"""Seeded workloads: equal draws, their lengths, what the model's context bounds."""

from __future__ import annotations

import json

import pytest

from bench.workload import (
    WORKLOADS,
    Draw,
    ModelShape,
    Workload,
    workload_from_dict,
    workload_to_dict,
)


def draw(name: str, *, context_tokens: int = 8192, seed: int = 1, num_requests: int = 16) -> Workload:
    shape = ModelShape(vocab_size=1000, context_tokens=context_tokens)
    return WORKLOADS[name](
        Draw(model=shape, concurrency=8, num_requests=num_requests, output_tokens=64, seed=seed)
    )


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_gives_the_same_prompts_and_another_gives_others(name: str) -> None:
    assert draw(name) == draw(name)
    assert not set(draw(name).prompts) & set(draw(name, seed=2).prompts)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_survives_json(name: str) -> None:
    workload = draw(name)
    assert workload_from_dict(json.loads(json.dumps(workload_to_dict(workload)))) == workload


def test_prompts_of_prefix_share_512_tokens() -> None:
    prompts = draw("prefix").prompts
    assert len({prompt[:512] for prompt in prompts}) == 1
    assert len({prompt[512:] for prompt in prompts}) == len(prompts)


def test_long_has_one_long_prompt_per_wave_from_2048_to_4000_tokens() -> None:
    workload = draw("long", num_requests=24)
    assert [len(one.prompt) for one in workload.late] == [2048, 3024, 4000]
    assert [one.after_output_tokens for one in workload.late] == [512, 2560, 4608]
    assert workload.output_tokens == 256


def test_long_prompts_are_bounded_by_the_context() -> None:
    workload = draw("long", context_tokens=1024)
    assert {len(one.prompt) for one in workload.late} == {1016}
    assert workload.context_tokens == 1024


def test_a_model_too_short_for_a_workload_is_refused() -> None:
    with pytest.raises(ValueError, match=r"workload prefix asks for .* the model has 512"):
        draw("prefix", context_tokens=512)
