"""When a stream that lost its replica goes on: the rule, the budget, the quarantine, and the joules of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import pytest

from cluster.energy.account import EnergyAccount, RequestEnergy, add_up, joined
from cluster.request.failover import FailoverBudget, Quarantine, Verdict, decide

LOST = RequestEnergy(
    prefill_mj=1000,
    decode_mj=2000,
    static_mj=500,
    wasted_mj=0,
    source="counter",
    method="step-ledger/1",
    window_ms=30.0,
    confidence_factor=1.05,
    is_final=False,
)
RESUMED = replace(LOST, prefill_mj=1500, decode_mj=4000, wasted_mj=200, window_ms=40.0, is_final=True)

AGAIN = [False, True]
"""The second attempt repeats the prompt of the first."""


@pytest.mark.parametrize(
    ("num_losses", "is_culprit", "has_budget", "verdict"),
    [
        (2, False, True, Verdict.RESUME),
        (1, False, False, Verdict.BUDGET_SPENT),
        (3, False, True, Verdict.REQUEST_SPENT),
        (2, True, True, Verdict.QUARANTINE),
        (3, True, False, Verdict.QUARANTINE),
    ],
)
def test_a_stream_is_moved_twice_and_not_at_all_where_a_replica_died_of_it(
    num_losses: int, is_culprit: bool, has_budget: bool, verdict: Verdict
) -> None:
    assert decide(num_losses, is_culprit=is_culprit, per_request=2, has_budget=has_budget) is verdict


def test_no_failover_is_a_limit_of_zero() -> None:
    assert decide(1, is_culprit=False, per_request=0, has_budget=True) is Verdict.REQUEST_SPENT


def test_the_budget_starts_with_a_burst_and_earns_a_share_of_the_traffic() -> None:
    budget = FailoverBudget(ratio=0.25, burst=2)
    for _ in range(2):
        budget.spend()
    assert not budget.has_token
    for _ in range(4):
        budget.earn()
    assert budget.has_token
    for _ in range(100):
        budget.earn()
    for _ in range(2):
        budget.spend()
    assert not budget.has_token


def test_a_quarantined_prompt_is_refused_for_its_time_only() -> None:
    quarantine = Quarantine(hold_s=600.0)
    assert not quarantine.holds("m", (1, 2), now_s=0.0)
    quarantine.add("m", (1, 2), now_s=0.0)
    assert quarantine.holds("m", (1, 2), now_s=599.0)
    assert not quarantine.holds("m", (1, 2, 3), now_s=1.0)
    assert not quarantine.holds("other", (1, 2), now_s=1.0)
    assert not quarantine.holds("m", (1, 2), now_s=600.0)
    assert len(quarantine) == 0


class Unread(Sequence[int]):
    """A prompt of three tokens that nobody may look at."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, _: object) -> NoReturn:
        raise AssertionError("was read")


def test_no_prompt_is_read_that_has_not_the_length_of_one_in_quarantine() -> None:
    quarantine = Quarantine(hold_s=600.0)
    quarantine.add("m", (1, 2), now_s=0.0)
    quarantine.add("other", (1, 2, 3), now_s=0.0)
    assert not quarantine.holds("m", Unread(), now_s=1.0)


def test_a_prompt_whose_time_is_over_is_forgotten_though_it_never_comes_again() -> None:
    quarantine = Quarantine(hold_s=600.0)
    for now_s in (0.0, 1.0):
        quarantine.add("m", (1, 2, 3), now_s=now_s)
    quarantine.add("m", (4,), now_s=2.0)
    assert not quarantine.holds("m", (9, 9), now_s=601.0)
    assert len(quarantine) == 1
    assert not quarantine.holds("m", Unread(), now_s=601.0)


def test_the_quarantine_lets_the_oldest_go() -> None:
    quarantine = Quarantine(capacity=2)
    for token_id in (1, 2, 1, 3):
        quarantine.add("m", (token_id,), now_s=0.0)
    assert [quarantine.holds("m", (token_id,), now_s=1.0) for token_id in (1, 2, 3)] == [True, False, True]


def test_the_joules_of_all_attempts_add_up() -> None:
    final = replace(LOST, is_final=True)
    assert add_up([final, RESUMED], repeated=AGAIN) == RequestEnergy(
        prefill_mj=2500,
        decode_mj=6000,
        static_mj=1000,
        wasted_mj=1500,
        source="counter",
        method="step-ledger/1",
        window_ms=40.0,
        confidence_factor=1.05,
        is_final=True,
    )


def test_the_hosts_joules_of_all_attempts_add_up_where_all_are_known() -> None:
    one, other = replace(LOST, host_mj=300), replace(RESUMED, host_mj=4)
    for bills, host_mj in (((one, other), 304), ((one, RESUMED), None), ((one, None), None)):
        whole = add_up(bills, repeated=AGAIN)
        assert whole is not None
        assert whole.host_mj == host_mj


def test_an_open_or_unknown_bill_keeps_the_sum_provisional() -> None:
    open_bill, unknown = add_up([LOST, RESUMED], repeated=AGAIN), add_up([None, RESUMED], repeated=AGAIN)
    assert open_bill is not None and unknown is not None
    assert (open_bill.total_mj, open_bill.is_final) == (8500, False)
    assert (unknown.total_mj, unknown.wasted_mj, unknown.is_final) == (5500, 1500, False)
    assert add_up([None, None], repeated=AGAIN) is None


def test_a_sum_is_called_by_its_least_certain_part() -> None:
    estimated = replace(RESUMED, source="tdp", confidence_factor=2.0)
    whole = add_up([LOST, estimated], repeated=[False, False])
    assert whole is not None
    assert (whole.source, whole.confidence_factor) == ("tdp", 2.0)
    assert whole.wasted_mj == 200


def test_a_joined_account_follows_its_attempts_until_all_are_settled() -> None:
    first, second = EnergyAccount(), EnergyAccount()
    first.update(LOST)
    whole = joined([first, second], repeated=AGAIN)
    settled: list[RequestEnergy | None] = []
    whole.when_settled(lambda: settled.append(whole.energy))
    second.update(RESUMED)
    assert (whole.energy, whole.is_settled) == (add_up([LOST, RESUMED], repeated=AGAIN), False)
    first.update(replace(LOST, decode_mj=2500, is_final=True))
    assert whole.energy is not None and whole.is_final
    assert (whole.energy.total_mj, settled) == (9000, [whole.energy])


def test_an_attempt_that_stays_unknown_settles_without_joules() -> None:
    first, second = EnergyAccount(), EnergyAccount()
    whole = joined([first, second], repeated=AGAIN)
    first.settle()
    second.update(RESUMED)
    assert whole.is_settled and not whole.is_final
    assert joined([second], repeated=[False]) is second
