"""Ratios round by round, the best peer of a case, and the verdict over a model."""

from __future__ import annotations

from bench.peers.comparison import CaseRatio, CaseResult, SystemFacts, judge, ratio
from bench.workload import Case

MIX, PREFIX = Case(workload="mix", concurrency=1), Case(workload="prefix", concurrency=8)
LONG = Case(workload="long", concurrency=8)


def result(name: str, case: Case, *tok_s: float, ttft_ms: float = 100.0, cached: bool = True) -> CaseResult:
    system = SystemFacts(name=name, version="1", is_ours=name.startswith("wattline"), has_prefix_cache=cached)
    rounds = tuple({"output_tok_s": one, "ttft_ms_p50": ttft_ms} for one in tok_s)
    return CaseResult(system=system, case=case, rounds=rounds)


def test_the_ratio_is_the_median_of_the_rounds_not_the_ratio_of_the_medians() -> None:
    ours, theirs = result("wattline", MIX, 100, 200, 900), result("a", MIX, 100, 100, 300)
    assert ratio(ours, theirs) == 2.0


def test_each_case_is_held_against_its_best_peer() -> None:
    results = [
        result("wattline", MIX, 200.0),
        result("a", MIX, 100.0),
        result("b", MIX, 50.0),
        result("wattline", PREFIX, 200.0, ttft_ms=30.0),
        result("a", PREFIX, 10.0, ttft_ms=60.0),
        result("b", PREFIX, 400.0, ttft_ms=300.0, cached=False),
    ]
    (verdict,) = judge(results)
    assert verdict.cases == (
        CaseRatio(case=MIX, best_peer="a", ratio=2.0),
        CaseRatio(case=PREFIX, best_peer="b", ratio=0.5),
    )
    assert (verdict.geometric_mean, verdict.least_ratio) == (1.0, 0.5)
    assert (verdict.prefix_ttft_over_cached, verdict.prefix_ttft_over_uncached) == (0.5, 0.1)


def test_long_prompts_count_in_no_mean() -> None:
    results = [
        result("wattline", MIX, 300.0),
        result("a", MIX, 100.0),
        result("wattline", LONG, 1.0),
        result("a", LONG, 100.0),
    ]
    (verdict,) = judge(results)
    assert (verdict.geometric_mean, verdict.least_ratio) == (3.0, 3.0)


def test_without_a_peer_there_is_no_verdict() -> None:
    assert judge([result("wattline", MIX, 1.0)]) == []
