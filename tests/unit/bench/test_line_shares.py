"""What the whole line keeps of the engine's own throughput."""

from __future__ import annotations

from bench.suites import BARE, ENGINE, LINE, line_shares


def make_row(system: str, rate: float) -> dict[str, object]:
    return {"system": system, "model": "llama", "concurrency": 32, "output_tok_s": rate}


def test_a_share_is_of_one_round_and_the_median_of_all() -> None:
    rates = [(90.0, 100.0, 95.0), (9.0, 10.0, 9.6), (40.0, 80.0, 70.0)]
    rows = [
        make_row(system, rate)
        for of_round in rates
        for system, rate in zip((LINE, ENGINE, BARE), of_round, strict=True)
    ]
    assert line_shares(rows) == [
        {"model": "llama", "concurrency": 32, "share_of_engine": 0.9, "bare_share_of_engine": 0.95}
    ]
