"""Rows of the ledger store as a router sends them: a request that took 4 J, a replica that counted 5 J."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster.ledger.entries import BilledEnergy, ReplicaSums, RequestEntry

ENERGY = BilledEnergy(
    prefill_mj=1000,
    decode_mj=3000,
    static_mj=500,
    wasted_mj=0,
    source="counter",
    method="step-ledger/1",
    confidence_factor=1.05,
    is_final=True,
)
_ENTRY = RequestEntry(
    request_id="r",
    trace_id="t",
    tenant="acme",
    model="m",
    outcome="stop",
    ended_s=1e9,
    prompt_tokens=10,
    cached_tokens=0,
    output_tokens=20,
    wasted_tokens=0,
    ttft_ms=1.0,
    total_ms=2.0,
    energy=ENERGY,
)
_SUMS = ReplicaSums(
    replica_id="x",
    epoch=1,
    model="m",
    source="counter",
    at_s=1e9,
    meter_mj=5000,
    request_mj=4000,
    idle_mj=900,
    unattributed_mj=100,
)


def make_entry(request_id: str = "r", **changes: Any) -> RequestEntry:
    return replace(_ENTRY, request_id=request_id, **changes)


def make_replica_sums(**changes: Any) -> ReplicaSums:
    return replace(_SUMS, **changes)
