"""The promise: float32 logits within 1e-4 of transformers and the same greedy tokens, however a model is
split over ranks, and whatever joins, leaves or is chunked around a sequence. Ranks are threads here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from replicas.config import RankConfig
from replicas.parallel.collectives import Collectives
from tests.checkpoints import make_granite, make_granite_moe, make_llama, reference_logits
from tests.rank_threads import run_rank_threads
from tests.scripted_rank import (
    ScriptedResult,
    make_script_configs,
    make_scripts,
    run_script,
)

MAX_RELATIVE_ERROR = 1e-4
DENSE_DEGREES = [(1, 1), (2, 1), (4, 1)]
SEEDS = {"llama": 10, "llama-tied-llama3": 14, "granite": 2, "granite-moe": 13}
MOE_DEGREES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 4)]
CASES = [
    (name, degrees) for name in SEEDS for degrees in (MOE_DEGREES if name == "granite-moe" else DENSE_DEGREES)
]


def make_all(root: Path) -> dict[str, Path]:
    """Seeds are such that no best token is nearly tied."""
    return {
        "llama": make_llama(root / "llama", max_shard_size="100KB", seed=SEEDS["llama"]),
        "llama-tied-llama3": make_llama(
            root / "llama-tied-llama3",
            is_tied=True,
            num_kv_heads=2,
            has_llama3_rope=True,
            head_dim=16,
            seed=SEEDS["llama-tied-llama3"],
        ),
        "granite": make_granite(root / "granite", seed=SEEDS["granite"]),
        "granite-moe": make_granite_moe(root / "granite-moe", seed=SEEDS["granite-moe"]),
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    return make_all(tmp_path_factory.mktemp("checkpoints"))


def compare(result: ScriptedResult, source: Path) -> None:
    """Teacher forcing: if every token is the argmax after those before it, greedy decoding gives the same."""
    scripts = make_scripts(seed=0, vocab_size=500)
    references = reference_logits(source, result.token_ids)
    for script, reference, token_ids, rows in zip(
        scripts, references, result.token_ids, result.logits, strict=True
    ):
        start = len(script.prompt_ids)
        ours, theirs = torch.stack(rows), reference[start - 1 : -1]
        scale = theirs.abs().max()
        assert (ours - theirs).abs().max() <= MAX_RELATIVE_ERROR * scale
        best = theirs.topk(2, dim=1).values
        assert (best[:, 0] - best[:, 1]).min() > MAX_RELATIVE_ERROR * scale, "a near-tie proves nothing"
        assert token_ids[start:] == theirs.argmax(dim=1).tolist()


@pytest.mark.parametrize("kernels", ["float32", "off"])
@pytest.mark.parametrize(("name", "degrees"), CASES)
def test_logits_and_tokens_are_those_of_transformers(
    tmp_path: Path, checkpoints: dict[str, Path], name: str, degrees: tuple[int, int], kernels: str
) -> None:
    source = checkpoints[name]
    configs = make_script_configs(tmp_path, source, tensor=degrees[0], expert=degrees[1], kernels=kernels)

    def work(config: RankConfig, collectives: Collectives) -> ScriptedResult:
        return run_script(config, collectives, make_scripts(seed=0, vocab_size=500))

    results = run_rank_threads(configs, work)
    first = results[0]
    assert isinstance(first, ScriptedResult), results
    compare(first, source)
    for other in results[1:]:
        assert isinstance(other, ScriptedResult), results
        assert other.token_ids == first.token_ids
        assert other.experts_hit == first.experts_hit
    assert (sum(first.experts_hit) > 0) == (name == "granite-moe")


@pytest.mark.parametrize("kernels", ["float32", "off"])
@pytest.mark.parametrize("expert", [2, 4])
def test_lanes_with_experts_between_them_give_what_transformers_gives(
    tmp_path: Path, checkpoints: dict[str, Path], expert: int, kernels: str
) -> None:
    """The `dispatch` layout; every rank knows all ids, and has the logits of its own lane."""
    source = checkpoints["granite-moe"]
    configs = make_script_configs(
        tmp_path, source, tensor=1, expert=expert, layout="dispatch", kernels=kernels
    )
    scripts = make_scripts(seed=0, vocab_size=500)
    results = run_rank_threads(configs, lambda config, ranks: run_script(config, ranks, scripts))
    merged = ScriptedResult(token_ids=[], logits=[[] for _ in scripts], experts_hit=[])
    for rank, result in enumerate(results):
        assert isinstance(result, ScriptedResult), results
        assert not merged.token_ids or result.token_ids == merged.token_ids
        assert not merged.experts_hit or result.experts_hit == merged.experts_hit
        merged.token_ids, merged.experts_hit = result.token_ids, result.experts_hit
        for index, script in enumerate(scripts):
            assert bool(result.logits[index]) == (script.lane % expert == rank)
            merged.logits[index] += result.logits[index]
    compare(merged, source)


@pytest.mark.parametrize(("head_dim", "num_kv_heads", "seed"), [(64, 8, 2), (64, 4, 1), (128, 2, 2)])
def test_heads_of_the_usual_sizes_have_their_own_kernels(
    tmp_path: Path, head_dim: int, num_kv_heads: int, seed: int
) -> None:
    torch.set_num_threads(1)
    source = make_llama(tmp_path / "llama", head_dim=head_dim, num_kv_heads=num_kv_heads, seed=seed)
    (config,) = make_script_configs(tmp_path, source, tensor=1, expert=1, threads=2)
    (result,) = run_rank_threads(
        [config], lambda config, ranks: run_script(config, ranks, make_scripts(seed=0, vocab_size=500))
    )
    assert isinstance(result, ScriptedResult), result
    compare(result, source)


@pytest.mark.parametrize("name", ["llama", "granite-moe"])
def test_half_weights_and_two_threads_change_no_bit(tmp_path: Path, name: str) -> None:
    """Values that are bfloat16 widen exactly, and every output is one sum in order, whoever computes it."""
    torch.set_num_threads(1)
    if name == "llama":
        source = make_llama(tmp_path / name, dtype=torch.bfloat16, seed=SEEDS[name])
    else:
        source = make_granite_moe(tmp_path / name, dtype=torch.bfloat16, seed=SEEDS[name])

    def work(config: RankConfig, collectives: Collectives) -> ScriptedResult:
        return run_script(config, collectives, make_scripts(seed=0, vocab_size=500))

    def run(kernels: str, threads: int) -> ScriptedResult:
        configs = make_script_configs(tmp_path, source, tensor=1, expert=1, kernels=kernels, threads=threads)
        (result,) = run_rank_threads(configs, work)
        assert isinstance(result, ScriptedResult), result
        return result

    plain, half = run("float32", 1), run("auto", 2)
    assert half.token_ids == plain.token_ids
    for ours, theirs in zip(half.logits, plain.logits, strict=True):
        assert torch.equal(torch.stack(ours), torch.stack(theirs))
