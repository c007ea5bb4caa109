"""How the cores are cut for `python -m bench ranks`, and what its rounds come to."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.ranks import RanksPlan, Split, parse_split, ratios, setup_of


def make_plan(threads: int) -> RanksPlan:
    return RanksPlan(
        models=(), splits=(), cases=(), kernels="auto", threads=threads, rounds=1, output_tokens=4
    )


def make_row(split: str, rate: float, concurrency: int = 8) -> dict[str, object]:
    return {
        "model": "m",
        "workload": "mix",
        "concurrency": concurrency,
        "split": split,
        "output_tok_s": rate,
    }


def test_a_split_names_the_kind_and_the_number_of_ranks() -> None:
    assert parse_split("solo") == Split(name="solo", kind="solo", num_ranks=1)
    assert parse_split("dispatch4") == Split(name="dispatch4", kind="dispatch", num_ranks=4)
    for wrong in ("tp", "tp1", "solo2", "pp2", ""):
        with pytest.raises(ValueError, match="no split"):
            parse_split(wrong)


def test_ranks_share_the_threads() -> None:
    setups = {
        name: setup_of(parse_split(name), Path("m"), make_plan(4)) for name in ("solo", "tp2", "dispatch4")
    }
    shapes = {name: (one.tensor, one.expert, one.layout, one.threads) for name, one in setups.items()}
    assert shapes == {
        "solo": (1, 1, "shared", 4),
        "tp2": (2, 1, "shared", 2),
        "dispatch4": (1, 4, "dispatch", 1),
    }
    with pytest.raises(ValueError, match="--threads 4 cannot be shared by the 3 ranks of ep3"):
        setup_of(parse_split("ep3"), Path("m"), make_plan(4))


def test_a_ratio_is_the_median_over_the_rounds() -> None:
    rates = (("solo", 100.0), ("tp2", 90.0), ("solo", 50.0), ("tp2", 60.0), ("solo", 10.0), ("tp2", 9.5))
    rows = [make_row(split, rate) for split, rate in rates] + [make_row("solo", 7.0, concurrency=1)]
    assert ratios(rows) == [
        {
            "model": "m",
            "workload": "mix",
            "concurrency": 8,
            "split": "tp2",
            "over": "solo",
            "ratio": 0.95,
            "rounds": [0.9, 1.2, 0.95],
        }
    ]
