"""Where a request goes, under every policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from cluster.balancing.balancer import choose
from cluster.balancing.decision import Candidate, Choice, Policy, Question, Reason, Target
from cluster.balancing.lane_view import LaneView
from cluster.balancing.output_estimate import OutputEstimate
from cluster.balancing.prediction import added_joules, predicted_ttft_s
from cluster.balancing.session import session_owner
from cluster.balancing.step_fit import StepFit
from tests.lanes import make_lane

TARGET = Target(ttft_s=1.0, tpot_s=0.1)


def ask(
    policy: Policy, *lanes: LaneView | Candidate, seed: int = 0, turn: int = 0
) -> tuple[str, Reason] | None:
    """The replica chosen for 100 prompt tokens and an answer of 50, and why."""
    candidates = tuple(one if isinstance(one, Candidate) else Candidate(lane=one) for one in lanes)
    question = Question(
        policy=policy,
        target=TARGET,
        prompt_tokens=100,
        output_tokens=50,
        candidates=candidates,
        draw=seed,
        turn=turn,
    )
    choice = choose(question)
    assert choice == choose(question), "the same question has the same answer"
    return None if choice is None else (_name(question, choice), choice.reason)


def _name(question: Question, choice: Choice) -> str:
    return question.candidates[choice.index].lane.replica_id


@pytest.mark.parametrize(
    "busier",
    [
        {"waiting_prefill_tokens": 500},
        {"unseen_prefill_tokens": 500, "unseen_requests": 1},
        {"running": 8},
        {"running": 1},
        {"prefill_tokens_per_s": 500.0},
        {"step_ms": 30.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", [Policy.LEAST_LOADED, Policy.PREFIX])
def test_the_replica_that_starts_sooner_gets_it(policy: Policy, busier: dict[str, object]) -> None:
    assert ask(policy, make_lane("a", **busier), make_lane("b")) == ("b", Reason.POLICY)
    assert ask(policy, make_lane("b"), make_lane("a", **busier)) == ("b", Reason.POLICY)


@pytest.mark.parametrize("policy", list(Policy))
def test_equals_share(policy: Policy) -> None:
    chosen = {ask(policy, make_lane("a"), make_lane("b"), seed=number, turn=number) for number in range(20)}
    assert chosen == {("a", Reason.POLICY), ("b", Reason.POLICY)}


@pytest.mark.parametrize("policy", list(Policy))
def test_a_full_replica_is_never_chosen(policy: Policy) -> None:
    full = make_lane("a", running=8, waiting=3, unseen_requests=1)
    assert ask(policy, full) is None
    placed = ask(policy, full, make_lane("b", waiting_prefill_tokens=10**6))
    assert placed is not None and placed[0] == "b"
    assert ask(policy) is None


@pytest.mark.parametrize("policy", list(Policy))
def test_old_snapshots_are_used_only_where_there_are_no_fresh_ones(policy: Policy) -> None:
    old = make_lane("old", snapshot_age_s=1.5)
    placed = ask(policy, old, make_lane("fresh", running=7))
    assert placed is not None and placed[0] == "fresh"
    lanes = [replace(old, replica_id=str(load), in_flight=load) for load in (5, 0)]
    assert {ask(policy, *lanes, seed=seed) for seed in range(20)} == {("0", Reason.STALE)}


def test_two_drawn_by_lot_are_compared() -> None:
    lanes = [make_lane("busy", running=5), make_lane("idle"), make_lane("half", running=2)]
    counts = Counter(placed[0] for seed in range(300) if (placed := ask(Policy.P2C, *lanes, seed=seed)))
    assert counts["busy"] == 0
    assert 150 < counts["idle"] < 250


def test_round_robin_takes_turns_by_name() -> None:
    lanes = [make_lane("b"), make_lane("a"), make_lane("c", running=7)]
    chosen = [placed[0] for turn in range(4) if (placed := ask(Policy.ROUND_ROBIN, *lanes, turn=turn))]
    assert chosen == ["a", "b", "c", "a"]


def test_a_cached_prompt_is_worth_as_much_queue_as_its_prefill() -> None:
    owner = Candidate(lane=make_lane("owner", waiting_prefill_tokens=70), cached_tokens=80)
    assert ask(Policy.PREFIX, owner, make_lane("b")) == ("owner", Reason.POLICY)
    longer = replace(owner, lane=make_lane("owner", waiting_prefill_tokens=90))
    assert ask(Policy.PREFIX, longer, make_lane("b")) == ("b", Reason.POLICY)


def test_a_hot_owner_loses_to_any_cold_replica() -> None:
    owner = Candidate(lane=make_lane("owner", running=7), cached_tokens=90)
    others = [make_lane(name, running=3) for name in "bcdef"]
    placed = ask(Policy.PREFIX, owner, *others)
    assert placed is not None and placed[0] != "owner"
    short_of_kv = replace(owner, lane=make_lane("owner", free_kv_tokens=40))
    placed = ask(Policy.PREFIX, short_of_kv, make_lane("b", waiting_prefill_tokens=300))
    assert placed is not None and placed[0] == "b"


@pytest.mark.parametrize("policy", [Policy.PREFIX, Policy.ENERGY])
def test_a_session_stays_where_that_costs_little(policy: Policy) -> None:
    home = Candidate(lane=make_lane("home", waiting_prefill_tokens=20), is_session=True)
    assert ask(policy, home, make_lane("b")) == ("home", Reason.SESSION)
    crowded = Candidate(lane=make_lane("home", waiting_prefill_tokens=900), is_session=True)
    assert ask(policy, crowded, make_lane("b")) == ("b", Reason.POLICY)


def test_energy_packs_and_leaves_the_idle_idle() -> None:
    busy, idle = make_lane("busy", running=3), make_lane("idle")
    assert ask(Policy.ENERGY, idle, busy) == ("busy", Reason.POLICY)
    assert ask(Policy.PREFIX, idle, busy) == ("idle", Reason.POLICY)


@pytest.mark.parametrize(
    "late",
    [
        {"running": 8},
        {"running": 3, "waiting_prefill_tokens": 650},
        {"running": 3, "step_ms": 80.0},
        {"running": 3, "free_kv_tokens": 100},
        {"running": 3, "step_ms": 60.0, "step_ms_per_sequence": 12.0},
    ],
    ids=str,
)
def test_packing_ends_where_the_objective_binds(late: dict[str, object]) -> None:
    assert ask(Policy.ENERGY, make_lane("idle"), make_lane("busy", **late)) == ("idle", Reason.POLICY)


def test_where_none_is_in_time_the_soonest_is_taken() -> None:
    lanes = [make_lane("late", waiting_prefill_tokens=5000), make_lane("sooner", waiting_prefill_tokens=3000)]
    assert ask(Policy.ENERGY, *lanes) == ("sooner", Reason.NONE_IN_TIME)


def test_a_replica_that_draws_less_is_woken_first_and_the_oldest_of_equals() -> None:
    thrifty = make_lane("thrifty", active_power_w=300.0)
    assert ask(Policy.ENERGY, make_lane("b"), thrifty) == ("thrifty", Reason.POLICY)
    assert ask(Policy.ENERGY, make_lane("new"), make_lane("old", attached_age_s=60.0)) == (
        "old",
        Reason.POLICY,
    )


def test_prediction_adds_prefill_ahead_the_step_and_the_wait_for_a_row() -> None:
    lane = make_lane(waiting_prefill_tokens=400, running=8)
    # Half a second of prefill, a step, and an eighth of an answer until a row is free.
    assert predicted_ttft_s(lane, uncached_tokens=100, output_tokens=80) == pytest.approx(0.5 + 0.01 + 0.1)


@pytest.mark.parametrize("unknown", ["active_power_w", "idle_power_w", "prefill_tokens_per_s", "step_ms"])
def test_a_lane_has_a_price_where_all_that_makes_it_was_measured(unknown: str) -> None:
    assert make_lane().has_price
    unsaid: dict[str, Any] = {unknown: 0.0}
    assert not make_lane(**unsaid).has_price


def test_added_joules_fall_with_the_company() -> None:
    idle = added_joules(make_lane(), uncached_tokens=100, output_tokens=50)
    assert idle == pytest.approx(400 * 0.1 + 400 * 0.01 * 50)
    busy = added_joules(make_lane(running=9), uncached_tokens=100, output_tokens=50)
    assert busy == pytest.approx(400 * 0.1 + 400 * 0.01 * 50 / 10)
    stretched = make_lane(running=9, step_ms_per_sequence=0.2)
    assert added_joules(stretched, uncached_tokens=100, output_tokens=50) == pytest.approx(busy + 500 * 0.01)


def test_the_step_fit_finds_what_a_sequence_adds() -> None:
    fit = StepFit()
    for round_index in range(200):
        num_running = 1 + round_index % 32
        fit.add(num_running=num_running, step_ms=10.0 + 0.2 * num_running)
    assert fit.ms_per_sequence == pytest.approx(0.2, rel=0.01)
    for _ in range(1000):
        fit.add(num_running=20, step_ms=14.0)
    assert fit.ms_per_sequence == pytest.approx(0.2, rel=0.05)


def test_the_output_estimate_follows_the_answers() -> None:
    estimate = OutputEstimate()
    assert estimate.tokens(max_tokens=100) == 100
    for _ in range(200):
        estimate.add(40)
    assert estimate.tokens(max_tokens=100) == 40
    assert estimate.tokens(max_tokens=8) == 8


def test_a_replica_that_leaves_moves_its_own_sessions_only() -> None:
    replica_ids = [f"r{number}" for number in range(5)]
    owners = {f"s{number}": session_owner(f"s{number}", replica_ids) for number in range(200)}
    assert min(Counter(owners.values()).values()) > 20
    for session, owner in owners.items():
        after = session_owner(session, [name for name in replica_ids if name != "r0"])
        assert after == owner or owner == "r0"
    assert session_owner("s", []) is None
