"""Where a request goes, and whether it comes in at all."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from cluster.router.admission import MAX_RETRY_MS, MIN_RETRY_MS, Decision, Verdict, decide
from cluster.router.balancer import LaneView, choose_lane, predicted_ttft_s


def make_lane(replica_id: str = "a", **fields: object) -> LaneView:
    lane = LaneView(
        replica_id=replica_id,
        lane=0,
        running=0,
        waiting=0,
        waiting_prefill_tokens=0,
        unseen_requests=0,
        unseen_prefill_tokens=0,
        in_flight=0,
        max_sequences=8,
        max_waiting=4,
        snapshot_age_s=0.1,
        step_ms=10.0,
        prefill_tokens_per_s=1000.0,
    )
    return replace(lane, **fields)  # type: ignore[arg-type]


def choose(*lanes: LaneView, seed: int = 0) -> str | None:
    lane = choose_lane(lanes, prompt_tokens=100, random=Random(seed))
    return lane.replica_id if lane else None


@pytest.mark.parametrize(
    "busier",
    [
        {"waiting_prefill_tokens": 500},
        {"unseen_prefill_tokens": 500, "unseen_requests": 1},
        {"running": 8},
        {"running": 1},
        {"prefill_tokens_per_s": 500.0},
        {"step_ms": 30.0},
    ],
    ids=str,
)
def test_the_replica_that_starts_sooner_gets_it(busier: dict[str, object]) -> None:
    assert choose(make_lane("a", **busier), make_lane("b")) == "b"
    assert choose(make_lane("b"), make_lane("a", **busier)) == "b"


def test_equals_share() -> None:
    chosen = {choose(make_lane("a"), make_lane("b"), seed=seed) for seed in range(20)}
    assert chosen == {"a", "b"}


def test_a_full_replica_is_never_chosen() -> None:
    full = make_lane("a", running=8, waiting=3, unseen_requests=1)
    assert choose(full) is None
    assert choose(full, make_lane("b", waiting_prefill_tokens=10**6)) == "b"
    assert choose() is None


def test_old_snapshots_are_used_only_where_there_are_no_fresh_ones() -> None:
    old = make_lane("old", snapshot_age_s=1.5)
    assert choose(old, make_lane("fresh", running=7)) == "fresh"
    lanes = [replace(old, replica_id=str(load), in_flight=load, running=0) for load in (5, 0)]
    assert {choose(*lanes, seed=seed) for seed in range(20)} == {"0"}


def test_prediction_adds_prefill_ahead_and_the_batch() -> None:
    lane = make_lane(waiting_prefill_tokens=400, running=8)
    assert predicted_ttft_s(lane, prompt_tokens=100) == pytest.approx(0.5 + 0.02 + 0.01, abs=1e-4)


def test_admission_in_order_of_what_cannot_be_helped() -> None:
    room, full = [make_lane()], [make_lane(running=8, waiting=4, waiting_prefill_tokens=1000)]

    def verdict(lanes: list[LaneView], *, is_stopping: bool = False, in_flight: int = 0) -> Decision:
        return decide(is_stopping=is_stopping, in_flight=in_flight, max_streams=2, lanes=lanes)

    assert verdict(room) == Decision(verdict=Verdict.ADMIT)
    assert verdict(room, is_stopping=True).verdict is Verdict.ROUTER_STOPPING
    assert verdict(room, in_flight=2) == Decision(verdict=Verdict.ROUTER_FULL, retry_after_ms=MIN_RETRY_MS)
    assert verdict([]).verdict is Verdict.NO_REPLICA
    assert verdict(full) == Decision(verdict=Verdict.REPLICAS_FULL, retry_after_ms=500)


def test_the_advised_wait_is_bounded() -> None:
    endless = make_lane(running=8, waiting=4, waiting_prefill_tokens=10**9)
    decision = decide(is_stopping=False, in_flight=0, max_streams=2, lanes=[endless])
    assert decision.retry_after_ms == MAX_RETRY_MS
