"""The energy of requests by who pays: exact, never falling, bounded."""

from __future__ import annotations

from random import Random

from replicas.energy.payers import NJ_PER_MJ, Payers, PayerSums


def test_whole_millijoules_go_to_whom_most_is_owed_and_none_is_lost() -> None:
    payers = Payers(most=8)
    for name in ("a", "b"):
        payers.known(name)
    prefill_nj, decode_nj = {"a": 600_000, "b": 700_000}, {"a": 0, "b": 2_500_000}
    payers.take(prefill_nj=prefill_nj, decode_nj=decode_nj, prefill_mj=1, decode_mj=2)
    assert payers.sums == {"a": PayerSums(0, 0), "b": PayerSums(1, 2)}
    prefill_nj, decode_nj = {"a": 600_000, "b": 100_000}, {"b": 500_000}
    payers.take(prefill_nj=prefill_nj, decode_nj=decode_nj, prefill_mj=1, decode_mj=1)
    assert payers.sums == {"a": PayerSums(1, 0), "b": PayerSums(1, 3)}


def test_sums_never_fall_and_stay_within_a_millijoule_of_what_was_given() -> None:
    random = Random(1)
    payers = Payers(most=8)
    given_nj = {payers.known(name): 0 for name in "abcd"}
    carry_nj = 0
    before = payers.sums
    for _ in range(500):
        window = {name: random.randrange(3_000_000) for name in random.sample("abcd", 3)}
        for name, decode_nj in window.items():
            given_nj[name] += decode_nj
        total_mj, carry_nj = divmod(sum(window.values()) + carry_nj, NJ_PER_MJ)
        payers.take(prefill_nj={}, decode_nj=window, prefill_mj=0, decode_mj=total_mj)
        after = payers.sums
        assert all(after[name].decode_mj >= before[name].decode_mj for name in before)
        before = after
    assert sum(each.decode_mj for each in before.values()) == sum(given_nj.values()) // NJ_PER_MJ
    for name, nj in given_nj.items():
        assert abs(before[name].decode_mj * NJ_PER_MJ - nj) <= NJ_PER_MJ


def test_payers_beyond_the_bound_are_one() -> None:
    payers = Payers(most=2)
    assert [payers.known(name) for name in ("a", "b", "c", "d", "a")] == ["a", "b", "other", "other", "a"]
