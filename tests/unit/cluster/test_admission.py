"""Whether a request comes in at all."""

from __future__ import annotations

from cluster.router.admission import MAX_RETRY_MS, MIN_RETRY_MS, Decision, Verdict, decide
from cluster.router.balancing.lane_view import LaneView
from tests.lanes import make_lane


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
