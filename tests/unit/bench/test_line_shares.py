"""What the whole line keeps of the engine's own throughput."""

from __future__ import annotations

from bench.suites import BARE, ENGINE, LINE, line_shares


def make_row(system: str, rate: float) -> dict[str, object]:
    row: dict[str, object] = {"system": system, "model": "llama", "concurrency": 32, "output_tok_s": rate}
    return row | ({"energy_in_time_share": rate / 100} if system == LINE else {})


def test_a_share_is_of_one_round_and_the_median_of_all() -> None:
    rates = [(90.0, 100.0, 95.0), (8.0, 10.0, 9.6), (40.0, 80.0, 70.0)]
    rows = [
        make_row(system, rate)
        for of_round in rates
        for system, rate in zip((LINE, ENGINE, BARE), of_round, strict=True)
    ]
    (share,) = line_shares(rows)
    assert share == {
        "model": "llama",
        "concurrency": 32,
        "share_of_engine": 0.8,
        "bare_share_of_engine": 0.95,
        "energy_in_time_share": 0.46,
    }
