"""Request + idle + unattributed == meter, in whole millijoules, whatever happens and whatever the weights.

`make soak` runs 100,000 ledgers; each is checked after every event of its run.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_ledgers import run_through_chaos

QUICK_LEDGERS = 1_500
SOAK_LEDGERS = 100_000
SOAK_STEPS = 10


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**48))
def test_p1_p2_every_millijoule_is_somewhere_once_whatever_happens(seed: int) -> None:
    run_through_chaos(seed)


def test_fifteen_hundred_short_ledgers_conserve() -> None:
    for seed in range(QUICK_LEDGERS):
        run_through_chaos(seed, most_steps=SOAK_STEPS)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_ledgers_conserve() -> None:
    for seed in range(SOAK_LEDGERS):
        run_through_chaos(seed, most_steps=SOAK_STEPS)
