"""The router's sums of what replicas' ledgers divided: whole, never falling, one life after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.energy.ledger_book import (
    RATE_AGE_S,
    HostSums,
    LedgerBook,
    LedgerSums,
    ReplicaLedger,
    TenantSums,
)

NS = 1_000_000_000


def make_sums(prefill_mj: int, decode_mj: int, idle_mj: int = 0, unattributed_mj: int = 0) -> LedgerSums:
    return LedgerSums(
        meter_mj=prefill_mj + decode_mj + idle_mj + unattributed_mj,
        prefill_mj=prefill_mj,
        decode_mj=decode_mj,
        idle_mj=idle_mj,
        unattributed_mj=unattributed_mj,
        static_mj=(prefill_mj + decode_mj) // 4,
    )


def make_ledger(
    sums: LedgerSums, *, until_s: int, replica_id: str = "a", epoch: int = 1, source: str = "counter"
) -> ReplicaLedger:
    return ReplicaLedger(
        replica_id=replica_id,
        epoch=epoch,
        until_ns=until_s * NS,
        sums={source: sums},
        confidence_factors={source: 1.05},
    )


def make_book(*lives: ReplicaLedger) -> LedgerBook:
    """One that has heard of these lives before they divided anything."""
    book = LedgerBook()
    for life in lives or (make_ledger(LedgerSums(), until_s=0),):
        book.add(life, now_s=0.0)
    return book


def test_a_report_replaces_the_one_before_it() -> None:
    book = make_book()
    book.add(make_ledger(make_sums(10, 20, 30), until_s=1), now_s=1.0)
    book.add(make_ledger(make_sums(15, 40, 30, 5), until_s=2), now_s=2.0)
    assert book.sums == {"counter": make_sums(15, 40, 30, 5)}
    assert book.confidence_factor("counter") == 1.05
    assert book.confidence_factor("tdp") is None


def test_what_was_divided_before_a_life_was_heard_of_is_not_counted_here() -> None:
    """A router that starts anew would else show the joules of ten days as those of its first second."""
    book = LedgerBook()
    book.add(make_ledger(make_sums(10**9, 10**9, 10**12), until_s=864_000), now_s=1.0)
    assert book.sums == {"counter": LedgerSums(tenants={})}
    book.add(make_ledger(make_sums(10**9 + 1_000, 10**9, 10**12 + 500), until_s=864_001), now_s=2.0)
    assert book.sums["counter"].meter_mj == 1_500
    assert book.idle_share.of_mj("counter", 200) == 100.0
    power = book.power("counter", now_s=2.0)
    assert power is not None
    assert power.meter_w == 1.5


def test_a_new_life_adds_to_the_old_one_and_a_second_replica_to_the_first() -> None:
    book = make_book(
        make_ledger(LedgerSums(), until_s=0),
        make_ledger(LedgerSums(), until_s=0, epoch=2),
        make_ledger(LedgerSums(), until_s=0, replica_id="b"),
    )
    book.add(make_ledger(make_sums(100, 0), until_s=1), now_s=1.0)
    book.add(make_ledger(make_sums(8, 0), until_s=2, epoch=2), now_s=2.0)
    book.add(make_ledger(make_sums(0, 4), until_s=2, replica_id="b"), now_s=2.0)
    assert book.sums["counter"] == make_sums(108, 4) + LedgerSums(
        static_mj=25 + 2 + 1 - make_sums(108, 4).static_mj
    )


def test_an_older_report_is_dropped() -> None:
    book = make_book()
    book.add(make_ledger(make_sums(10, 10), until_s=5), now_s=1.0)
    book.add(make_ledger(make_sums(5, 5), until_s=4), now_s=2.0)
    assert book.sums["counter"] == make_sums(10, 10)


def test_sources_are_kept_apart() -> None:
    tdp = make_ledger(LedgerSums(), until_s=0, replica_id="b", source="tdp")
    book = make_book(make_ledger(LedgerSums(), until_s=0), tdp)
    book.add(make_ledger(make_sums(1, 1), until_s=1), now_s=1.0)
    book.add(make_ledger(make_sums(2, 2), until_s=1, replica_id="b", source="tdp"), now_s=1.0)
    assert book.sums == {"counter": make_sums(1, 1), "tdp": make_sums(2, 2)}
    book.add(make_ledger(make_sums(1001, 1), until_s=2), now_s=2.0)
    book.add(make_ledger(make_sums(2, 3002), until_s=2, replica_id="b", source="tdp"), now_s=2.0)
    powers = [book.power(source, now_s=2.0) for source in ("counter", "tdp", "shared")]
    assert [power and power.meter_w for power in powers] == [1.0, 3.0, None]


def test_a_meter_that_gave_way_draws_no_more() -> None:
    book = LedgerBook()
    before = make_ledger(make_sums(500, 0), until_s=1)
    book.add(before, now_s=1.0)
    after = ReplicaLedger(
        replica_id="a",
        epoch=1,
        until_ns=2 * NS,
        sums={"counter": make_sums(500, 0), "power_integrated": make_sums(700, 0)},
        confidence_factors={"power_integrated": 1.1},
    )
    book.add(after, now_s=2.0)
    assert book.power("counter", now_s=2.0) is None
    power = book.power("power_integrated", now_s=2.0)
    assert power is not None
    assert power.meter_w == 0.7


def test_power_is_what_was_divided_over_the_time_it_was_divided_for() -> None:
    book = LedgerBook()
    book.add(make_ledger(make_sums(0, 0), until_s=1), now_s=1.0)
    assert book.power("counter", now_s=1.0) is None
    book.add(make_ledger(make_sums(100_000, 300_000, 200_000), until_s=3), now_s=3.0)
    power = book.power("counter", now_s=3.0)
    assert power is not None
    assert (power.prefill_w, power.decode_w, power.idle_w, power.meter_w) == (50.0, 150.0, 100.0, 300.0)
    assert power.static_w == 50.0
    assert book.power("counter", now_s=3.0 + RATE_AGE_S + 0.1) is None


def test_a_host_has_an_account_of_its_own_whatever_its_devices_are_read_by() -> None:
    book = make_book(make_ledger(make_sums(0, 0), until_s=1))
    book.add(make_ledger(make_sums(1000, 0), until_s=2), now_s=2.0)
    assert (book.host, book.host_w(now_s=2.0)) == (None, None)
    hosts = {"counter": (6000, 4000), "power_integrated": (3000, 1000)}
    after = ReplicaLedger(
        replica_id="a",
        epoch=1,
        until_ns=4 * NS,
        sums={
            source: replace(make_sums(1000, 0), host_meter_mj=meter_mj, host_requests_mj=requests_mj)
            for source, (meter_mj, requests_mj) in hosts.items()
        },
        confidence_factors={},
    )
    book.add(after, now_s=4.0)
    assert book.host == HostSums(meter_mj=9000, requests_mj=5000)
    assert book.host.rest_mj == 4000
    assert book.host_w(now_s=4.0) == 4.5
    assert book.host_w(now_s=4.0 + RATE_AGE_S + 0.1) is None


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 2), *(st.integers(0, 10**9) for _ in range(4))),
        max_size=40,
    )
)
def test_the_parts_are_the_whole_whatever_the_replicas_do(
    reports: list[tuple[str, int, int, int, int, int]],
) -> None:
    book = LedgerBook()
    lives: dict[tuple[str, int], LedgerSums] = {}
    first: dict[tuple[str, int], LedgerSums] = {}
    for second, (replica_id, epoch, *parts) in enumerate(reports):
        now = lives[replica_id, epoch] = lives.get((replica_id, epoch), LedgerSums()) + make_sums(*parts)
        first.setdefault((replica_id, epoch), now)
        ledger = make_ledger(now, until_s=second, replica_id=replica_id, epoch=epoch)
        book.add(ledger, now_s=float(second))
    assert all(sums.is_conserved for sums in book.sums.values())
    known = sum(first.values(), LedgerSums())
    assert sum(book.sums.values(), LedgerSums()) == sum(lives.values(), LedgerSums()).minus(known)
    power = book.power("counter", now_s=float(len(reports)))
    if power is not None:
        parts_w = power.prefill_w + power.decode_w + power.idle_w + power.unattributed_w
        assert parts_w == pytest.approx(power.meter_w)


def test_tenants_of_all_replicas_are_added_up_and_those_beyond_the_bound_are_one() -> None:
    book = LedgerBook()
    for number in range(3):
        names = [f"tenant-{number}-{index}" for index in range(30)] + ["red"]
        sums = replace(
            make_sums(2 * len(names), 0),
            tenants={name: TenantSums(prefill_mj=2) for name in names},
        )
        book.add(make_ledger(LedgerSums(), until_s=0, replica_id=str(number)), now_s=0.0)
        book.add(make_ledger(sums, until_s=1, replica_id=str(number)), now_s=1.0)
    sums = book.sums["counter"]
    assert sums.tenants["red"] == TenantSums(prefill_mj=6)
    assert sum(each.prefill_mj for each in sums.tenants.values()) == sums.prefill_mj == 186
    assert len(sums.tenants) == 65
    assert sums.tenants["other"].prefill_mj == 2 * (90 + 1 - 64)
