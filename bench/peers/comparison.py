"""What the rounds of a comparison say: medians, ratios round by round, and the geometric mean. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.workload import Case

Fields = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemFacts:
    """What a system is. `has_prefix_cache`: prompts that begin alike are computed once."""

    name: str
    version: str
    is_ours: bool
    has_prefix_cache: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """The rounds of one system on one case; round i of every system ran next to the others' round i."""

    system: SystemFacts
    case: Case
    rounds: tuple[Fields, ...]

    def median(self, field: str) -> float:
        return statistics.median(one[field] for one in self.rounds)

    def medians(self) -> dict[str, float]:
        """Of every field, as a row shows them."""
        return {field: round(self.median(field), 5) for field in self.rounds[0]}


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRatio:
    """Output tokens a second of ours over the best peer's: more is better."""

    case: Case
    best_peer: str
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One engine of ours on one model against the best peer of each case.

    The means are over the throughput cases. TTFT ratios are ours over the quickest peer with (without) a
    prefix cache: less is better, None where no such peer ran.
    """

    system: str
    cases: tuple[CaseRatio, ...]
    geometric_mean: float
    least_ratio: float
    prefix_ttft_over_cached: float | None
    prefix_ttft_over_uncached: float | None


def ratio(ours: CaseResult, theirs: CaseResult, field: str = "output_tok_s") -> float:
    """The median over rounds of ours / theirs: what drifts between rounds cancels."""
    pairs = zip(ours.rounds, theirs.rounds, strict=True)
    return round(statistics.median(one[field] / other[field] for one, other in pairs), 3)


def judge(results: Sequence[CaseResult]) -> list[Verdict]:
    """A verdict per engine of ours over the results of one model; none where no peer ran."""
    engines = dict.fromkeys(one.system for one in results if one.system.is_ours)
    peers = [one for one in results if not one.system.is_ours]
    verdicts = (_judge_one([one for one in results if one.system == engine], peers) for engine in engines)
    return [one for one in verdicts if one is not None]


def _judge_one(mine: Sequence[CaseResult], peers: Sequence[CaseResult]) -> Verdict | None:
    ratios = [one for one in (_case_ratio(own, peers) for own in mine) if one is not None]
    counted = [one.ratio for one in ratios if one.case.is_throughput]
    if not counted:
        return None
    prefix = next((own for own in mine if own.case.workload == "prefix"), None)
    return Verdict(
        system=mine[0].system.name,
        cases=tuple(ratios),
        geometric_mean=round(statistics.geometric_mean(counted), 3),
        least_ratio=min(counted),
        prefix_ttft_over_cached=_ttft_ratio(prefix, peers, has_prefix_cache=True),
        prefix_ttft_over_uncached=_ttft_ratio(prefix, peers, has_prefix_cache=False),
    )


def _case_ratio(own: CaseResult, peers: Sequence[CaseResult]) -> CaseRatio | None:
    theirs = [one for one in peers if one.case == own.case]
    if not theirs:
        return None
    best = max(theirs, key=lambda one: one.median("output_tok_s"))
    return CaseRatio(case=own.case, best_peer=best.system.name, ratio=ratio(own, best))


def _ttft_ratio(
    own: CaseResult | None, peers: Sequence[CaseResult], *, has_prefix_cache: bool
) -> float | None:
    if own is None:
        return None
    theirs = [
        one for one in peers if one.case == own.case and one.system.has_prefix_cache == has_prefix_cache
    ]
    if not theirs:
        return None
    return ratio(own, min(theirs, key=lambda one: one.median("ttft_ms_p50")), "ttft_ms_p50")
