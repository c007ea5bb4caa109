"""What the rows of the edge say: medians over rounds, ratios within a round, goals."""

from __future__ import annotations

from bench.edge.flood import Watched
from bench.edge.targets import goals, median_rows, throughput_ratios


def make_row(system: str, tok_s: float, **fields: object) -> dict[str, object]:
    return {
        "system": system,
        "streams": 8,
        "tok_s": tok_s,
        "progress_ratio": 1.5,
        "cpu_us_per_token": {"server": tok_s / 10},
        **fields,
    }


ROWS = [
    make_row(system, rate)
    for slowdown in (1, 10, 2)
    for system, rate in (
        ("wattline-1", 900 / slowdown),
        ("echo", 1000 / slowdown),
        ("ray-serve", 100 / slowdown),
    )
]


def test_a_ratio_is_of_one_round_whatever_slows_the_machine_between_rounds() -> None:
    (ratio,) = throughput_ratios(ROWS)
    assert ratio == {"system": "wattline-1", "streams": 8, "over_echo": 0.9, "over_ray-serve": 9.0}


def test_a_system_that_stood_still_has_no_ratio_and_is_no_goal_missed() -> None:
    rows = [
        make_row(system, rate) for system, rate in (("wattline-1", 9.0), ("echo", 1.0), ("ray-serve", 0.0))
    ]
    (ratio,) = throughput_ratios(rows)
    assert (ratio["over_echo"], ratio["over_ray-serve"]) == (9.0, None)
    reached = goals([ratio], [], [], {"mib_per_reader": 0.5, "share_kept": 1.0})
    assert [(goal["reached"], goal["is_met"]) for goal in reached[:2]] == [(None, True), (9.0, True)]


def test_a_median_row_has_the_median_of_every_field_and_of_every_process() -> None:
    first = median_rows(ROWS)[0]
    assert first == make_row("wattline-1", 450.0, rounds=3)


def test_a_stream_that_starved_in_one_round_is_not_averaged_away() -> None:
    rows = [make_row("wattline-1", 1.0), make_row("wattline-1", 1.0, progress_ratio=None)]
    (median,) = median_rows(rows)
    assert median["progress_ratio"] is None
    reached = goals([], [median], [], {"mib_per_reader": 0.5, "share_kept": 0.9})
    assert [(goal["reached"], goal["is_met"]) for goal in reached] == [
        (None, False),
        (0.5, True),
        (0.9, False),
    ]


def test_goals_are_those_of_one_router() -> None:
    ratios = throughput_ratios(ROWS)
    two = [row | {"system": "wattline-2", "over_echo": 0.1} for row in ratios]
    ttft = [{"streams": 1, "added_ttft_ms_p50": 3.5}]
    reached = goals([*ratios, *two], [], ttft, {"mib_per_reader": 1.5, "share_kept": 1.0})
    assert [(goal["reached"], goal["is_met"]) for goal in reached] == [
        (9.0, True),
        (0.9, True),
        (3.5, False),
        (1.5, False),
        (1.0, True),
    ]


def test_a_window_without_a_token_of_one_stream_has_no_ratio() -> None:
    watched = Watched(tokens=(4, 0), num_messages=2, window_s=2.0, cpu_s={"server": 0.001})
    assert watched.row() == {
        "streams": 2,
        "tok_s": 2.0,
        "tokens_per_message": 2.0,
        "progress_ratio": None,
        "starved_streams": 1,
        "cpu_us_per_token": {"server": 250.0},
    }
