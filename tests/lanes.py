"""Lanes as the balancer sees them, for tests of its decisions."""

from __future__ import annotations

from dataclasses import replace

from cluster.balancing.lane_view import LaneView


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
        free_kv_tokens=10_000,
        snapshot_age_s=0.1,
        step_ms=10.0,
        prefill_tokens_per_s=1000.0,
        idle_power_w=100.0,
        active_power_w=500.0,
    )
    return replace(lane, **fields)  # type: ignore[arg-type]
