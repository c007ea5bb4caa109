"""What is shown of the experts: tokens of each, imbalance with and without copies, in bounded series."""

from __future__ import annotations

from replicas.expert_loads import ExpertLoads
from replicas.supervisor.expert_metrics import MAX_SERIES, ExpertSnapshot, next_snapshot

LOADS = ExpertLoads(num_experts=4, tokens=(80, 4, 8, 8, 5, 5, 5, 5), num_ranks=2, spares=(-1, 0, -1, -1))


def values(snapshot: ExpertSnapshot) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in snapshot.families()
        for sample in family.samples
    }


def test_tokens_and_imbalance_with_and_without_copies() -> None:
    shown = values(next_snapshot(None, LOADS))
    assert shown["wattline_expert_tokens_total", "0", "0"] == 80
    assert shown["wattline_expert_tokens_total", "1", "3"] == 5
    assert shown["wattline_expert_imbalance", "0"] == 1.12
    assert shown["wattline_expert_imbalance_without_copies", "0"] == 1.68
    assert shown["wattline_expert_imbalance", "1"] == 1.0
    assert (shown["wattline_expert_copies", "0"], shown["wattline_expert_copies", "1"]) == (1, 0)
    assert len(shown) == 8 + 3 * 2


def test_what_was_long_ago_weighs_little() -> None:
    snapshot = next_snapshot(None, ExpertLoads(num_experts=2, tokens=(1000, 0), num_ranks=2))
    assert values(snapshot)["wattline_expert_imbalance", "0"] == 2.0
    for tokens in range(10, 2000, 10):
        snapshot = next_snapshot(
            snapshot, ExpertLoads(num_experts=2, tokens=(1000 + tokens, tokens), num_ranks=2)
        )
    assert values(snapshot)["wattline_expert_imbalance", "0"] < 1.01


def test_one_rank_has_no_imbalance() -> None:
    shown = values(next_snapshot(None, ExpertLoads(num_experts=2, tokens=(3, 1))))
    assert shown == {
        ("wattline_expert_tokens_total", "0", "0"): 3,
        ("wattline_expert_tokens_total", "0", "1"): 1,
    }


def test_a_huge_model_is_summed_over_its_layers() -> None:
    num_layers = MAX_SERIES // 256 + 1
    shown = values(next_snapshot(None, ExpertLoads(num_experts=256, tokens=(2,) * 256 * num_layers)))
    assert len(shown) == 256
    assert shown["wattline_expert_tokens_total", "all", "255"] == 2 * num_layers
