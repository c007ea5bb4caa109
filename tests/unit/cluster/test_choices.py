"""Choices of one request: their seeds, and their sums."""

from __future__ import annotations

from cluster.energy.account import EnergyAccount, RequestEnergy, summed
from cluster.router.choices import choice_seed


def make_energy(*, mj: int, is_final: bool) -> RequestEnergy:
    return RequestEnergy(
        prefill_mj=mj,
        decode_mj=2 * mj,
        static_mj=1,
        wasted_mj=0,
        source="fake",
        method="step-ledger/1",
        window_ms=float(mj),
        confidence_factor=1.0 + mj,
        is_final=is_final,
    )


def test_the_first_choice_keeps_its_seed_and_the_others_have_their_own() -> None:
    """Recorded values: the same seed must give the same answers from one version to the next."""
    assert (choice_seed(7, 0), choice_seed(7, 1)) == (7, 1338637269673548254)
    seeds = [choice_seed(7, index) for index in range(8)]
    assert len(set(seeds)) == 8 and all(0 <= seed < 2**64 for seed in seeds)
    assert choice_seed(2**64 - 1, 3) != choice_seed(2**64 - 2, 3)


def test_a_sum_is_unknown_until_all_are_known_and_final_when_all_are() -> None:
    first, second = EnergyAccount(), EnergyAccount()
    total = summed([first, second])
    first.update(make_energy(mj=10, is_final=True))
    assert total.energy is None
    second.update(make_energy(mj=4, is_final=False))
    assert total.energy is not None and not total.is_settled
    assert (total.energy.total_mj, total.energy.is_final) == (42, False)
    second.update(make_energy(mj=5, is_final=True))
    assert total.is_settled and total.is_final
    assert (total.energy.total_mj, total.energy.window_ms, total.energy.confidence_factor) == (45, 10.0, 11.0)


def test_a_sum_settles_without_joules_when_one_of_its_parts_never_learns_them() -> None:
    first, second = EnergyAccount(), EnergyAccount()
    total = summed([first, second])
    first.update(make_energy(mj=10, is_final=True))
    second.settle()
    assert total.is_settled and total.energy is None


def test_the_sum_of_one_is_itself() -> None:
    account = EnergyAccount()
    assert summed([account]) is account
