"""Who is blamed for a second death, and who may go on beside whom."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cluster.request.failover import LossReason
from cluster.router.suspicion import CLEAR, Probation, Standing
from replicas.supervisor.in_flight import PROOF_TOKENS

KILLED, FAILED, FROZEN = LossReason.KILLED, LossReason.FAILED, LossReason.FROZEN
DRAINED = LossReason.DRAINED
SUSPECT = Standing(num_deaths=1, death="old")
TWICE = Standing(num_deaths=2, death="old")


@dataclass(eq=False)
class FakeTrial:
    num_tokens: int = 0
    is_over: bool = False


@pytest.mark.parametrize(
    ("lost", "num_deaths"),
    [
        ([(0, KILLED)], 1),
        ([(500, FAILED)], 1),
        ([(0, FROZEN)], 0),
        ([(0, KILLED), (0, DRAINED)], 1),
        ([(0, KILLED), (PROOF_TOKENS, DRAINED)], 0),
        ([(50, KILLED), (PROOF_TOKENS, DRAINED)], 1),
        ([(50, KILLED), (0, KILLED)], 2),
        ([(50, KILLED), (50, KILLED)], 2),
        ([(0, KILLED), (50, KILLED)], 1),
        ([(50, KILLED), (50 + PROOF_TOKENS, KILLED)], 1),
        ([(0, KILLED), (0, FAILED), (PROOF_TOKENS, DRAINED)], 0),
    ],
)
def test_a_death_is_held_against_a_stream_until_it_has_outlived_it(
    lost: list[tuple[int, LossReason]], num_deaths: int
) -> None:
    standing = CLEAR
    for num_tokens, loss in lost:
        standing = standing.after(FakeTrial(num_tokens), loss, replica="r")
    assert standing.num_deaths == num_deaths


def test_suspects_go_on_one_at_a_time_and_others_wait_for_nobody() -> None:
    probation, first = Probation(), FakeTrial()
    assert probation.admits(SUSPECT)
    probation.join(first, SUSPECT)
    assert probation.admits(CLEAR) and not probation.admits(SUSPECT)
    first.num_tokens = PROOF_TOKENS
    assert probation.admits(SUSPECT)
    second = FakeTrial()
    probation.join(second, SUSPECT)
    second.is_over = True
    assert probation.admits(SUSPECT)


def prove(probation: Probation, count: int) -> None:
    """So many come and prove themselves, as many at a time as may."""
    for _ in range(count):
        probation.join(FakeTrial(PROOF_TOKENS), SUSPECT)


def num_together(probation: Probation, standing: Standing) -> int:
    count = 0
    while probation.admits(standing):
        probation.join(FakeTrial(), standing)
        count += 1
    return count


@pytest.mark.parametrize(("num_proofs", "together"), [(0, 1), (7, 1), (8, 2), (20, 5), (63, 15)])
def test_the_more_have_proven_themselves_the_more_go_together(num_proofs: int, together: int) -> None:
    probation = Probation()
    prove(probation, num_proofs)
    assert num_together(probation, SUSPECT) == together


def test_what_went_well_says_nothing_of_another_death() -> None:
    probation = Probation()
    prove(probation, 20)
    assert num_together(probation, Standing(num_deaths=1, death="another")) == 1


def test_who_has_two_deaths_against_it_goes_alone() -> None:
    probation = Probation()
    prove(probation, 20)
    assert num_together(probation, TWICE) == 1
    assert not probation.admits(SUSPECT)


def test_only_who_alone_had_to_prove_itself_is_the_culprit() -> None:
    probation, suspect, stranger = Probation(), FakeTrial(), FakeTrial()
    proven = FakeTrial()
    probation.join(proven, Standing(num_deaths=1, outlives_tokens=500, death="old"))
    proven.num_tokens = PROOF_TOKENS
    probation.join(suspect, SUSPECT)
    assert [probation.is_culprit(one) for one in (stranger, proven, suspect)] == [False, False, True]


@pytest.mark.parametrize(("num_tokens", "is_culprit"), [(499, True), (500, False)])
def test_where_all_have_proven_themselves_it_is_the_only_one_that_did_not_outlive_its_death(
    num_tokens: int, is_culprit: bool
) -> None:
    probation, late, clear = Probation(), FakeTrial(num_tokens), FakeTrial(PROOF_TOKENS)
    probation.join(late, Standing(num_deaths=1, outlives_tokens=500, death="old"))
    probation.join(clear, SUSPECT)
    assert [probation.is_culprit(one) for one in (clear, late)] == [False, is_culprit]


@pytest.mark.parametrize(
    ("standing", "num_unproven", "is_culprit"),
    [(SUSPECT, 0, True), (SUSPECT, 1, True), (SUSPECT, 2, False), (TWICE, 2, True)],
)
def test_none_is_blamed_at_a_second_death_where_another_router_tried_one_too(
    standing: Standing, num_unproven: int, is_culprit: bool
) -> None:
    probation, suspect = Probation(), FakeTrial()
    probation.join(suspect, standing)
    assert probation.is_culprit(suspect, num_unproven=num_unproven) is is_culprit


def test_of_several_none_is_blamed_however_late_the_others_ask() -> None:
    probation, one, other = Probation(), FakeTrial(), FakeTrial()
    probation.join(one, SUSPECT)
    probation.join(other, SUSPECT)
    assert not probation.is_culprit(one)
    one.is_over = True
    assert not probation.is_culprit(other)
