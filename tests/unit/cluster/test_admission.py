"""Whether a request comes in, when it may not, and what its tenant has left."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random

import pytest

from cluster.admission.decision import (
    ADMITTED,
    MAX_RETRY_MS,
    MIN_RETRY_MS,
    Arrival,
    Decision,
    Verdict,
    Wait,
    decide_arrival,
    decide_wait,
)
from cluster.admission.energy_lease import DAY_S, Grant, LocalLeases, Wallet
from cluster.admission.pace import MAX_SPREAD, MIN_SPREAD, Forecast, Pace, takes_more
from cluster.admission.share import Shares
from cluster.admission.tenant import LimitHit, Tenant
from cluster.admission.tenant_account import TenantAccount
from cluster.admission.tenants import Tenants
from cluster.admission.token_bucket import TokenBucket
from cluster.router.refusal import Refusals
from tests.lanes import make_lane

ARRIVAL = Arrival(is_stopping=False, in_flight=0, max_streams=2, has_replica=True, tenant_limit=None)
WAIT = Wait(
    num_queued=1,
    max_queued=4,
    can_displace=False,
    is_below_share=False,
    wait_s=0.1,
    late_s=0.1,
    start_s=0.1,
    deadline_s=None,
    target_ttft_s=None,
)


def test_arrivals_are_refused_in_order_of_what_cannot_be_helped() -> None:
    hit = LimitHit(limit="tokens_per_s", value=100.0, retry_after_s=1.5)
    assert decide_arrival(ARRIVAL) == ADMITTED
    worse = replace(ARRIVAL, tenant_limit=hit)
    decision = decide_arrival(worse)
    assert (decision.verdict, decision.retry_after_ms) == (Verdict.TENANT_LIMIT, 1500)
    assert decision.reason == "the tenant's limit tokens_per_s=100 is reached"
    worse = replace(worse, in_flight=2)
    assert decide_arrival(worse).verdict is Verdict.ROUTER_FULL
    worse = replace(worse, has_replica=False)
    assert decide_arrival(worse).verdict is Verdict.NO_REPLICA
    assert decide_arrival(replace(worse, is_stopping=True)).verdict is Verdict.ROUTER_STOPPING


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, Verdict.ADMIT),
        ({"num_queued": 4}, Verdict.QUEUE_FULL),
        ({"num_queued": 4, "can_displace": True}, Verdict.ADMIT),
        ({"deadline_s": 0.25}, Verdict.ADMIT),
        ({"deadline_s": 0.15}, Verdict.DEADLINE),
        ({"target_ttft_s": 1.0, "late_s": 0.45}, Verdict.ADMIT),
        ({"target_ttft_s": 1.0, "late_s": 0.55}, Verdict.OBJECTIVE),
        # Below its share, what is likely counts, and not what is possible.
        ({"target_ttft_s": 1.0, "late_s": 0.55, "is_below_share": True}, Verdict.ADMIT),
        ({"target_ttft_s": 1.0, "wait_s": 0.95, "is_below_share": True}, Verdict.OBJECTIVE),
        # A long prompt is late by itself: some waiting is allowed all the same.
        ({"target_ttft_s": 1.0, "late_s": 0.2, "start_s": 5.0}, Verdict.ADMIT),
        ({"target_ttft_s": 1.0, "late_s": 0.3, "start_s": 5.0}, Verdict.OBJECTIVE),
        ({"wait_s": 100.0}, Verdict.ADMIT),
    ],
    ids=str,
)
def test_who_may_wait(changes: dict[str, float], verdict: Verdict) -> None:
    assert decide_wait(replace(WAIT, **changes)).verdict is verdict  # type: ignore[arg-type]


def test_the_advised_wait_is_what_the_queue_is_too_long_by_within_bounds() -> None:
    late = replace(WAIT, deadline_s=1.0)
    assert decide_wait(replace(late, wait_s=3.0)).retry_after_ms == pytest.approx(2100, abs=1)
    assert decide_wait(replace(late, wait_s=1e6)).retry_after_ms == MAX_RETRY_MS
    assert decide_wait(replace(late, wait_s=0.91)).retry_after_ms == MIN_RETRY_MS


def test_an_engine_gets_little_more_than_it_can_begin() -> None:
    def takes(**fields: int) -> bool:
        return takes_more(make_lane("a", **fields), uncached_tokens=100, output_tokens=50)

    assert takes()
    assert takes(running=7)
    assert takes(running=8)
    assert not takes(running=9)
    assert takes(running=1, waiting_prefill_tokens=100)
    assert not takes(running=1, waiting_prefill_tokens=101)
    assert not takes(running=1, free_kv_tokens=100)
    assert takes(free_kv_tokens=0), "an idle engine knows best"


def test_the_pace_is_measured_while_others_wait_and_computed_before() -> None:
    pace, lanes = Pace(), [make_lane(running=8), make_lane("b", running=8)]

    def wait_s(now_s: float) -> float:
        return pace.forecast(1350.0, lanes, prompt_tokens=100, output_tokens=50, now_s=now_s).mean_s

    # Nine requests and this one at twenty a second: each prompt takes a tenth of a second at either lane.
    assert wait_s(0.0) == pytest.approx(0.5)
    for number in range(11):
        pace.left(150, now_s=number * 0.2)
    assert wait_s(2.0) == pytest.approx(2.0)
    pace.ran_empty()
    assert wait_s(2.0) == pytest.approx(0.5)
    assert pace.forecast(9.0, [], prompt_tokens=1, output_tokens=1, now_s=0.0) == Forecast()


def test_a_short_queue_is_the_least_certain_and_long_waits_teach() -> None:
    pace = Pace()
    for number in range(11):
        pace.left(150, now_s=number * 0.125)
    pace.spread = 3.0

    def forecast(num_ahead: int) -> Forecast:
        return pace.forecast(150.0 * num_ahead, [], prompt_tokens=900, output_tokens=900, now_s=1.25)

    # Its own length is no matter: it waits for one row. A gap is 0.125 s.
    assert forecast(0) == Forecast(mean_s=0.125, late_s=0.5, deviation_s=0.125)
    assert forecast(3) == Forecast(mean_s=0.5, late_s=1.25, deviation_s=0.25)
    for _ in range(100):
        pace.waited(forecast(0), actual_s=60.0)
    assert pace.spread == MAX_SPREAD
    for _ in range(10_000):
        pace.waited(forecast(0), actual_s=0.01)
    assert pace.spread == MIN_SPREAD


def test_who_had_less_than_its_weight_is_below_its_share_until_it_floods() -> None:
    flood, small, double = Tenant(name="flood"), Tenant(name="small"), Tenant(name="double", weight=2.0)
    shares = Shares()
    assert not shares.is_below(flood, 1.0, waiting={}), "alone, there is nobody above"
    for _ in range(300):
        shares.give(flood, 10.0)
    assert not shares.is_below(flood, 10.0, waiting={})
    assert shares.is_below(small, 640.0, waiting={}), "half of the 128 requests that are remembered"
    assert not shares.is_below(small, 641.0, waiting={})
    assert not shares.is_below(small, 10.0, waiting={"small": (small, 1400.0)}), "what waits counts"
    shares.give(double, 10.0)
    assert shares.is_below(double, 800.0, waiting={})
    for _ in range(128):
        shares.give(small, 0.5)
    assert shares.is_below(flood, 10.0, waiting={}), "what was long ago is forgotten"


def test_a_bucket_lets_a_burst_through_and_then_the_rate() -> None:
    bucket = TokenBucket(100.0, now_s=0.0)
    bucket.take(800.0, now_s=0.0)
    assert bucket.wait_s(now_s=0.0) == pytest.approx(3.0, abs=0.01)
    assert bucket.wait_s(now_s=3.01) == 0.0
    bucket.take(-10_000.0, now_s=4.0)
    bucket.take(501.0, now_s=4.0)
    assert bucket.wait_s(now_s=4.0) > 0.0, "giving back does not fill it beyond its size"


def test_every_limit_of_a_tenant_is_named() -> None:
    tenant = Tenant(name="t", requests_per_s=1.0, tokens_per_s=10.0, concurrent=1, joules_per_day=100.0)

    def hit(**limits: object) -> str | None:
        account = TenantAccount(replace(tenant, **limits), now_s=0.0)  # type: ignore[arg-type]
        if account.wallet is not None:
            account.wallet.add(Grant(granted_mj=1000, retry_after_s=0.0, day=1))
            assert account.limit_hit(now_s=0.0) is None
            account.wallet.reserve(1000)
        for _ in range(5):
            account.begin(now_s=0.0)
        account.charge_tokens(50, now_s=0.0)
        found = account.limit_hit(now_s=0.0)
        return None if found is None else found.limit

    assert hit() == "concurrent"
    assert hit(concurrent=None) == "requests_per_s"
    assert hit(concurrent=None, requests_per_s=None) == "tokens_per_s"
    assert hit(concurrent=None, requests_per_s=None, tokens_per_s=None) == "joules_per_day"
    assert hit(concurrent=None, requests_per_s=None, tokens_per_s=None, joules_per_day=None) is None


async def test_leases_add_up_to_the_budget_of_a_day() -> None:
    now_s = 10.0 * DAY_S
    leases = LocalLeases({"t": 5.0}, wall_s=lambda: now_s)
    assert (await leases.lease("t", want_mj=3000)).granted_mj == 3000
    assert (await leases.lease("t", want_mj=3000)).granted_mj == 2000
    now_s += 3600.0
    denied = await leases.lease("t", want_mj=3000)
    assert (denied.granted_mj, denied.retry_after_s) == (0, 23 * 3600.0)
    await leases.give_back("t", unspent_mj=500, day=10)
    assert (await leases.lease("t", want_mj=3000)).granted_mj == 500
    now_s += DAY_S
    await leases.give_back("t", unspent_mj=9999, day=10)
    assert (await leases.lease("t", want_mj=9000)).granted_mj == 5000


class SlowLeases(LocalLeases):
    """Grants nothing before it is told to; `asked` has the tenants in their order."""

    def __init__(self) -> None:
        super().__init__({"a": 100.0, "b": 100.0}, wall_s=lambda: 0.0)
        self.asked: list[str] = []
        self.go_on = {"a": asyncio.Event(), "b": asyncio.Event()}

    async def lease(self, tenant: str, *, want_mj: int) -> Grant:
        self.asked.append(tenant)
        await self.go_on[tenant].wait()
        return await super().lease(tenant, want_mj=want_mj)


async def test_a_lease_is_one_tenant_s_and_outlives_the_caller_who_asked_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.admission.tenants.LEASE_TIMEOUT_S", 150.0)
    leases = SlowLeases()
    tenants = Tenants([Tenant(name=name, joules_per_day=100.0) for name in "ab"], leases=leases)
    a, b = tenants.account("a"), tenants.account("b")
    gone = asyncio.create_task(tenants.lease_joules(a))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert leases.asked == ["a"]
    leases.go_on["b"].set()
    await tenants.lease_joules(b)
    assert b.limit_hit(now_s=0.0) is None, "it does not wait behind the other"
    waiting = asyncio.create_task(tenants.lease_joules(a))
    await asyncio.sleep(0)
    gone.cancel()
    leases.go_on["a"].set()
    await waiting
    assert a.limit_hit(now_s=0.0) is None
    assert leases.asked == ["a", "b"]
    await tenants.close()
    assert (await leases.lease("a", want_mj=10**6)).granted_mj == 100_000


def test_a_wallet_carries_debts_but_no_savings_into_the_next_day() -> None:
    wallet = Wallet(1000.0)
    assert (wallet.has_joules, wallet.wanted_mj) == (False, 10_000)
    wallet.add(Grant(granted_mj=10_000, retry_after_s=0.0, day=1))
    wallet.reserve(4_000)
    wallet.settle(4_000, spent_mj=13_000)
    assert (wallet.balance_mj, wallet.reserved_mj, wallet.wanted_mj) == (-3_000, 0, 13_000)
    wallet.add(Grant(granted_mj=13_000, retry_after_s=0.0, day=2))
    assert wallet.balance_mj == 10_000
    wallet.add(Grant(granted_mj=1_000, retry_after_s=0.0, day=3))
    assert wallet.balance_mj == 1_000


def test_advice_to_come_back_is_spread_and_never_sooner() -> None:
    refusals = Refusals(Random(0))
    decision = Decision(verdict=Verdict.OBJECTIVE, reason="late", retry_after_ms=1000)
    advised = [refusals.of(decision).retry_after_ms or 0 for _ in range(100)]
    assert min(advised) >= 1000 and max(advised) <= 1500 and len(set(advised)) > 50
    limit = Decision(verdict=Verdict.TENANT_LIMIT, reason="limit", retry_after_ms=1000)
    assert 1000 <= (refusals.of(limit, tenant="t").retry_after_ms or 0) <= 1500
