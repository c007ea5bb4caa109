"""Who is blamed for a second death, and who may go on beside whom."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cluster.request.failover import LossReason
from cluster.router.suspicion import PROOF_TOKENS, Probation, Standing, standing_of

KILLED, FAILED, FROZEN = LossReason.KILLED, LossReason.FAILED, LossReason.FROZEN
DRAINED = LossReason.DRAINED
CLEAR, WITNESS, SUSPECT = Standing.CLEAR, Standing.WITNESS, Standing.SUSPECT


@dataclass(eq=False)
class FakeTrial:
    num_tokens: int = 0
    is_over: bool = False


@pytest.mark.parametrize(
    ("lost", "standing"),
    [
        ([(0, KILLED)], SUSPECT),
        ([(PROOF_TOKENS - 1, FAILED)], SUSPECT),
        ([(PROOF_TOKENS, KILLED)], WITNESS),
        ([(0, FROZEN)], CLEAR),
        ([(0, KILLED), (0, DRAINED)], SUSPECT),
        ([(50, KILLED), (0, DRAINED)], WITNESS),
        ([(0, KILLED), (PROOF_TOKENS, DRAINED)], CLEAR),
        ([(50, KILLED), (0, KILLED)], SUSPECT),
        ([(0, KILLED), (50, KILLED)], WITNESS),
    ],
)
def test_a_stream_stands_as_its_last_death_found_it(
    lost: list[tuple[int, LossReason]], standing: Standing
) -> None:
    trials = [FakeTrial(num_tokens) for num_tokens, _ in lost]
    assert standing_of(trials, [loss for _, loss in lost]) is standing


def test_a_suspect_goes_on_alone_and_witnesses_together() -> None:
    probation, witness = Probation(), FakeTrial()
    probation.join(witness, WITNESS)
    assert [probation.admits(one) for one in (CLEAR, WITNESS, SUSPECT)] == [True, True, False]
    witness.num_tokens = PROOF_TOKENS
    suspect = FakeTrial()
    assert probation.admits(SUSPECT)
    probation.join(suspect, SUSPECT)
    assert [probation.admits(one) for one in (CLEAR, WITNESS, SUSPECT)] == [True, False, False]
    suspect.is_over = True
    assert probation.admits(SUSPECT)


def test_only_who_alone_had_to_prove_itself_is_the_culprit() -> None:
    probation, proven, suspect, stranger = Probation(), FakeTrial(), FakeTrial(), FakeTrial()
    probation.join(proven, WITNESS)
    proven.num_tokens = PROOF_TOKENS
    probation.join(suspect, SUSPECT)
    assert [probation.is_culprit(one) for one in (stranger, proven, suspect)] == [False, False, True]


def test_of_several_none_is_blamed_however_late_the_others_ask() -> None:
    probation, one, other = Probation(), FakeTrial(), FakeTrial()
    probation.join(one, WITNESS)
    probation.join(other, WITNESS)
    assert not probation.is_culprit(one)
    one.is_over = True
    assert not probation.is_culprit(other)
