"""The ledger's file against a plain list: whatever is recorded, sent twice or pruned, the sums are right."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ledger.database import HOUR_S, Database
from cluster.ledger.entries import BilledEnergy, ReplicaSums, RequestEntry, Summary

NOW_S = 1_000 * HOUR_S

energies = st.builds(
    BilledEnergy,
    prefill_mj=st.integers(0, 10**6),
    decode_mj=st.integers(0, 10**6),
    static_mj=st.integers(0, 10**5),
    wasted_mj=st.integers(0, 10**5),
    source=st.sampled_from(["counter", "tdp"]),
    method=st.just("step-ledger/1"),
    confidence_factor=st.sampled_from([1.05, 2.0]),
    is_final=st.booleans(),
    host_mj=st.none() | st.integers(0, 10**6),
)
entries = st.builds(
    RequestEntry,
    request_id=st.integers(0, 40).map(str),
    trace_id=st.just("t"),
    tenant=st.sampled_from(["a", "b"]),
    model=st.sampled_from(["m", "n"]),
    outcome=st.just("stop"),
    ended_s=st.integers(NOW_S - 20 * HOUR_S, NOW_S - 1).map(float),
    prompt_tokens=st.integers(0, 1000),
    cached_tokens=st.integers(0, 1000),
    output_tokens=st.integers(0, 1000),
    wasted_tokens=st.integers(0, 1000),
    ttft_ms=st.just(1.0),
    total_ms=st.just(2.0),
    energy=st.none() | energies,
)


def tally(summary: Summary) -> Counter[tuple[str, ...]]:
    """Every sum of a summary, by what it is of."""
    found: Counter[tuple[str, ...]] = Counter()
    for sums in summary.requests:
        key = (sums.tenant, sums.model, sums.source)
        found.update(
            {
                (*key, "requests"): sums.num_requests,
                (*key, "output"): sums.output_tokens,
                (*key, "prefill"): sums.prefill_mj,
                (*key, "wasted"): sums.wasted_mj,
                (*key, "final"): sums.num_final,
                (*key, "host"): sums.host_mj,
                (*key, "hosts known"): sums.num_host,
            }
        )
    return +found


def expected(known: list[RequestEntry]) -> Counter[tuple[str, ...]]:
    found: Counter[tuple[str, ...]] = Counter()
    for entry in known:
        key = (entry.tenant, entry.model, entry.energy.source if entry.energy else "")
        found[(*key, "requests")] += 1
        found[(*key, "output")] += entry.output_tokens
        if entry.energy:
            found[(*key, "prefill")] += entry.energy.prefill_mj
            found[(*key, "wasted")] += entry.energy.wasted_mj
            found[(*key, "final")] += entry.energy.is_final
            found[(*key, "host")] += entry.energy.host_mj or 0
            found[(*key, "hosts known")] += entry.energy.host_mj is not None
    return +found


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.lists(entries, max_size=12), max_size=5),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 30),
)
def test_sums_are_those_of_a_plain_list(
    batches: list[list[RequestEntry]], since_h: int, prune_h: int, max_requests: int
) -> None:
    """Pruning forgets requests one by one, never their hours, so sums by whole hours stay what they were."""
    known: dict[str, RequestEntry] = {}
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "ledger.db")
        for batch in (*batches, *batches):  # Every batch is sent twice.
            num_new = database.record(batch, [])
            new = {entry.request_id: entry for entry in reversed(batch) if entry.request_id not in known}
            assert num_new == len(new)
            known.update(new)
        since_s = NOW_S - since_h * HOUR_S
        recent = [entry for entry in known.values() if entry.ended_s >= since_s]
        assert tally(database.summarize(since_s=since_s, until_s=NOW_S)) == expected(recent)
        listed = list(database.list_requests(since_s=since_s, until_s=NOW_S))
        assert sorted(listed, key=lambda one: one.request_id) == sorted(
            recent, key=lambda one: one.request_id
        )
        database.prune(now_s=NOW_S, request_days=prune_h / 24, sums_days=30, max_requests=max_requests)
        kept = list(database.list_requests(since_s=0.0, until_s=NOW_S))
        old = [entry for entry in kept if entry.ended_s < NOW_S - HOUR_S]
        assert len(kept) <= max_requests or not old
        assert all(entry.ended_s >= NOW_S - prune_h * HOUR_S for entry in old)
        assert tally(database.summarize(since_s=since_s, until_s=NOW_S)) == expected(recent)
        database.close()


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["one", "two"]), st.integers(0, 500), st.integers(1, 900)), max_size=25
    ),
    st.integers(0, 24),
)
def test_meters_count_what_was_added_within_the_span(added: list[tuple[str, int, int]], since_h: int) -> None:
    """Each report adds some millijoules, a third of them idle; lives begin at 0."""
    totals: Counter[str] = Counter()
    at_s = float(NOW_S - 24 * HOUR_S)
    since_s = float(NOW_S - since_h * HOUR_S)
    within = 0
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "ledger.db")
        for replica, mj, gap_s in added:
            at_s = min(at_s + 60 + gap_s, NOW_S - 1.0)
            totals[replica] += 3 * mj
            within += 3 * mj if at_s >= since_s else 0
            total = totals[replica]
            sums = ReplicaSums(
                replica_id=replica,
                epoch=1,
                model="m",
                source="counter",
                at_s=at_s,
                meter_mj=total,
                request_mj=total - total // 3,
                idle_mj=total // 3,
                unattributed_mj=0,
                host_meter_mj=total // 2,
                host_request_mj=total // 3,
            )
            database.record([], [sums, sums])
        found = database.summarize(since_s=since_s, until_s=NOW_S).models
        assert sum(one.meter_mj for one in found) == within
        assert all(one.host_request_mj <= one.host_meter_mj <= one.meter_mj for one in found)
        assert all(one.request_mj + one.idle_mj + one.unattributed_mj == one.meter_mj for one in found)
        database.close()


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=20))
def test_no_more_is_granted_a_day_than_its_budget(budget_mj: int, asked: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "ledger.db")
        spent_mj = 0
        for want_mj, unspent_mj in asked:
            granted_mj = database.lease("a", want_mj=want_mj, budget_mj=budget_mj, day=7)
            assert granted_mj == min(want_mj, budget_mj - spent_mj)
            given_back_mj = min(granted_mj, unspent_mj)
            database.give_back("a", unspent_mj=given_back_mj, day=7)
            spent_mj += granted_mj - given_back_mj
        assert database.lease("a", want_mj=5000, budget_mj=budget_mj, day=8) == budget_mj
        database.close()
