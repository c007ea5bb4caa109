"""What the whole line keeps of the engine's own throughput."""

from __future__ import annotations

from bench.suites import line_shares


def make_row(system: str, rate: float) -> dict[str, object]:
    row: dict[str, object] = {"system": system, "model": "llama", "concurrency": 32, "output_tok_s": rate}
    return row | ({"energy_in_time_share": rate / 100} if system == "wattline-line" else {})


def test_a_share_is_of_one_round_and_the_median_of_all() -> None:
    rates = [(90.0, 100.0), (8.0, 10.0), (40.0, 80.0)]
    rows = [
        make_row(system, rate)
        for pair in rates
        for system, rate in zip(("wattline-line", "wattline-engine"), pair, strict=True)
    ]
    assert line_shares(rows) == [
        {"model": "llama", "concurrency": 32, "share_of_engine": 0.8, "energy_in_time_share": 0.46}
    ]
