"""Learning what work costs from the meter: predictions come right, shares follow, nothing goes below 0."""

from __future__ import annotations

from random import Random

import pytest

from replicas.energy.learning import WINDOWS_TO_TRUST, CoefficientLearner, LearnedFactors
from replicas.energy.weights import CPU_COEFFICIENTS, GPU_COEFFICIENTS, DeviceCoefficients, StepWork

TRUE_W, TRUE_J_PER_FLOP, TRUE_J_PER_BYTE = 320.0, 4.0e-13, 2.0e-10


def make_work(random: Random) -> StepWork:
    """100 ms of an H100: between all prefill and all decode."""
    seconds = random.uniform(0.05, 0.1)
    prefill = random.random()
    return StepWork(seconds, 4e14 * seconds * prefill, 2.4e12 * seconds * (1.0 - prefill))


def joules(work: StepWork) -> float:
    return TRUE_W * work.seconds + TRUE_J_PER_FLOP * work.flops + TRUE_J_PER_BYTE * work.traffic_bytes


def teach(learner: CoefficientLearner, random: Random, num_windows: int, *, noise: float = 0.03) -> None:
    for _ in range(num_windows):
        work = make_work(random)
        learner.observe(work, round(1e3 * joules(work) * max(0.1, random.gauss(1.0, noise))))


@pytest.mark.parametrize("shipped", [GPU_COEFFICIENTS, CPU_COEFFICIENTS], ids=["gpu", "cpu"])
def test_ten_seconds_of_windows_bring_the_ratio_to_one(shipped: DeviceCoefficients) -> None:
    learner = CoefficientLearner(shipped)
    assert (learner.ratio, learner.is_trusted) == (None, False)
    teach(learner, Random(1), 100)
    assert learner.is_trusted
    assert learner.ratio == pytest.approx(1.0, abs=0.05)


def test_p13_after_fifty_windows_held_ones_are_predicted_within_two_percent() -> None:
    learner = CoefficientLearner(GPU_COEFFICIENTS)
    teach(learner, Random(3), 50)
    random = Random(4)
    held = [make_work(random) for _ in range(100)]
    shares = learner.coefficients
    predicted = [
        shares.static_w * w.seconds
        + shares.joules_per_flop * w.flops
        + shares.joules_per_byte * w.traffic_bytes
        for w in held
    ]
    scale = sum(joules(work) for work in held) / sum(predicted)
    errors = [
        abs(scale * one - joules(work)) / joules(work) for one, work in zip(predicted, held, strict=True)
    ]
    assert sum(errors) / len(errors) < 0.02


def test_shares_stay_as_shipped_until_the_learner_is_trusted() -> None:
    learner = CoefficientLearner(GPU_COEFFICIENTS)
    teach(learner, Random(5), WINDOWS_TO_TRUST - 1)
    assert learner.coefficients is GPU_COEFFICIENTS
    teach(learner, Random(6), 11)
    assert learner.coefficients != GPU_COEFFICIENTS


def test_a_meter_without_sense_is_never_trusted() -> None:
    learner = CoefficientLearner(GPU_COEFFICIENTS)
    teach(learner, Random(7), 200, noise=2.0)
    assert not learner.is_trusted
    assert learner.coefficients is GPU_COEFFICIENTS


def test_factors_never_fall_below_zero_and_time_always_weighs() -> None:
    learner = CoefficientLearner(GPU_COEFFICIENTS)
    random = Random(8)
    for _ in range(200):
        work = make_work(random)
        learner.observe(work, round(1e3 * 5e-10 * work.traffic_bytes) + 100)
    assert min(learner.known.factors) >= 0.0
    assert learner.coefficients.static_w > 0.0


def test_a_device_that_changes_is_learned_again() -> None:
    """A power limit halves what everything costs."""
    learner = CoefficientLearner(GPU_COEFFICIENTS)
    random = Random(9)
    teach(learner, random, 300)
    for _ in range(900):
        work = make_work(random)
        learner.observe(work, round(500 * joules(work)))
    assert learner.ratio == pytest.approx(1.0, abs=0.05)


def test_a_later_life_goes_on_where_the_last_one_ended() -> None:
    first = CoefficientLearner(GPU_COEFFICIENTS)
    teach(first, Random(10), 200)
    later = CoefficientLearner(GPU_COEFFICIENTS, known=first.known)
    teach(later, Random(11), 5)
    assert later.is_trusted
    assert later.ratio == pytest.approx(1.0, abs=0.05)


def test_windows_of_a_few_millijoules_say_nothing() -> None:
    learner = CoefficientLearner(GPU_COEFFICIENTS)
    learner.observe(StepWork(0.1, 1e12, 1e11), 19)
    learner.observe(StepWork(0.0, 0.0, 0.0), 5000)
    assert (learner.ratio, learner.known.num_windows) == (None, 0)


@pytest.mark.parametrize("factors", [(-1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (float("nan"), 1.0, 1.0)])
def test_factors_that_cannot_be_are_refused(factors: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="factors="):
        LearnedFactors(factors=factors, num_windows=3)
