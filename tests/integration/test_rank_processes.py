"""Ranks as real processes: they generate what one rank generates, and notice a killed peer at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from replicas.config import ParallelConfig, RankConfig
from tests.checkpoints import make_granite_moe, make_llama
from tests.rank_processes import choose_small_sums, lose_a_peer, spawn_ranks
from tests.rank_threads import make_rank_config, run_rank_threads
from tests.scripted_rank import ScriptedResult, follow_scripts, make_script_configs, make_scripts, run_script

pytestmark = pytest.mark.processes


def solo_tokens(folder: Path, source: Path) -> list[list[int]]:
    configs = make_script_configs(folder, source, tensor=1, expert=1)
    (result,) = run_rank_threads(
        configs, lambda config, ranks: run_script(config, ranks, make_scripts(seed=0, vocab_size=500))
    )
    assert isinstance(result, ScriptedResult), result
    return result.token_ids


def named_configs(folder: Path, source: Path, tensor: int, expert: int) -> list[RankConfig]:
    group = f"{source.name}-{tensor}-{expert}"
    configs = make_script_configs(folder, source, tensor=tensor, expert=expert)
    return [replace(config, group=group) for config in configs]


def test_processes_generate_what_one_rank_generates(tmp_path: Path) -> None:
    sources = {
        "llama": make_llama(tmp_path / "llama", seed=10),
        "moe": make_granite_moe(tmp_path / "moe", vocab_size=515, seed=3),
    }
    wanted = {name: solo_tokens(tmp_path, source) for name, source in sources.items()}
    groups = {
        "llama": named_configs(tmp_path, sources["llama"], 4, 1),
        "moe": named_configs(tmp_path, sources["moe"], 4, 4),
        "pair": named_configs(tmp_path, sources["llama"], 2, 1),
    }
    arguments: list[tuple[object, ...]] = [
        ([configs[rank] for configs in groups.values() if rank < len(configs)],) for rank in range(4)
    ]
    exit_codes, reports = spawn_ranks(follow_scripts, arguments)
    assert exit_codes == [0, 0, 0, 0]
    assert len(reports) == 10
    for _, group, value in reports:
        assert isinstance(value, tuple)
        assert value[0] == wanted[group.split("-")[0]]


def test_a_killed_peer_is_lost_at_once(tmp_path: Path) -> None:
    arguments: list[tuple[object, ...]] = [
        (
            make_rank_config(tmp_path, rank=rank, parallel=ParallelConfig(tensor=2), timeout_s=150.0),
            tmp_path,
        )
        for rank in range(2)
    ]
    exit_codes, reports = spawn_ranks(lose_a_peer, arguments)
    assert exit_codes == [0, -9]
    whole = {(rank, what): value for rank, what, value in reports}
    for rank in range(2):
        assert whole[rank, "gathered"] == [[[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [6, 8, 10]]]
        assert whole[rank, "summed"] == [[0, 3, 6], [9, 12, 15]]
        assert whole[rank, "rows"] == [[0, 3, 6], [0, 3, 6], [9, 12, 15]]
        assert whole[rank, "row sums"] == [[2, 2]] * (1 + rank)
        assert whole[rank, "shared"] == [1, 1, 1]
    assert whole[0, "shared-lost"] == "the process of rank 1 ended"
    assert whole[0, "gloo-lost"] == "RuntimeError"
    assert list(tmp_path.iterdir()) == []


def test_small_sums_go_another_way_only_if_it_is_right_on_every_rank(tmp_path: Path) -> None:
    """And once a group is warm, a peer that is late is lost."""
    exit_codes, reports = spawn_ranks(choose_small_sums, [(rank, tmp_path) for rank in range(2)])
    assert exit_codes == [0, 0]
    for rank in range(2):
        said = [(what, value) for who, what, value in reports if who == rank]
        assert said[:5] == [
            ("alone", "gloo"),
            ("wrong", "gloo"),
            ("right", "one-shot"),
            ("sums", [3.0, 3.0, 3.0]),
            ("served", [(8,)]),
        ]
    assert [value for _, what, value in reports if what == "late"] == ["barrier", "sum"]
