"""Several choices of one request through a whole router: seeds, ends, one bill, and every way to fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from cluster.router import service
from cluster.router.caller import Caller
from cluster.router.choices import choice_seed
from protos import wattline_inference_pb2 as pb
from protos import wattline_link_pb2 as link
from tests.fake_replica import EOS, MJ_PER_TOKEN, EnergyMode, Fate, hash_token
from tests.router_fixture import (
    MODEL,
    VOCAB_SIZE,
    TestRouter,
    collect_choices,
    fail,
    make_config,
    make_request,
    run_test_router,
    spell,
)

WAIT_S = 150.0
LONG = 30


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    async with run_test_router() as running:
        yield running


def make_choices(n: int, **fields: object) -> pb.GenerateRequest:
    return make_request("hi", sampling=pb.Sampling(temperature=1.0, seed=5, n=n), **fields)


def by_seed(submit: link.Submit, pos: int) -> int:
    """A different text for every choice; the second ends early."""
    if submit.sampling.seed == choice_seed(5, 1) and pos == 2:
        return EOS
    return spell("abcdefgh")[submit.sampling.seed % 8]


async def test_choices_have_seeds_texts_and_ends_of_their_own_and_one_bill(router: TestRouter) -> None:
    async with router.replica(tokens=by_seed) as replica:
        call = router.inference.Generate(make_choices(3, energy_wait_ms=1000))
        choices, final = await collect_choices(call)
        submits = [command.submit for command in replica.received("submit")]
    seeds = [choice_seed(5, index) for index in range(3)]
    assert [submit.sampling.seed for submit in submits] == seeds
    assert len({(*submit.prompt_ids, submit.cache_salt) for submit in submits}) == 1
    letters = ["abcdefgh"[seed % 8] for seed in seeds]
    assert [choice.text for choice in choices] == [letters[0] * 8, letters[1] * 2, letters[2] * 8]
    assert [choice.finish_reason for choice in choices] == [
        pb.FINISH_REASON_LENGTH,
        pb.FINISH_REASON_STOP,
        pb.FINISH_REASON_LENGTH,
    ]
    assert (final.usage.prompt_tokens, final.usage.completion_tokens) == (6, 8 + 3 + 8)
    assert final.energy.state == pb.ENERGY_STATE_FINAL
    assert final.energy.total_j == pytest.approx((3 * 1000 + 19 * MJ_PER_TOKEN) / 1e3)
    found = await router.inference.GetEnergy(pb.GetEnergyRequest(request_id=final.request_id))
    assert (found.energy.total_j, found.usage) == (final.energy.total_j, final.usage)


async def test_joules_of_choices_are_final_only_when_all_are(router: TestRouter) -> None:
    async with router.replica(energy=EnergyMode.LATE) as replica:
        _, final = await collect_choices(router.inference.Generate(make_choices(2, energy_wait_ms=0)))
        assert final.energy.state == pb.ENERGY_STATE_PROVISIONAL
        await replica.close_energy()
        request = pb.GetEnergyRequest(request_id=final.request_id)
        found = await router.inference.GetEnergy(request)
        while found.energy.state != pb.ENERGY_STATE_FINAL:
            found = await router.inference.GetEnergy(request)
    assert found.energy.total_j == pytest.approx((2 * 1000 + 16 * MJ_PER_TOKEN) / 1e3)


async def test_a_caller_that_leaves_cancels_every_choice(router: TestRouter) -> None:
    async with router.replica() as replica:
        call = router.inference.Generate(make_choices(4, max_tokens=500))
        await replica.wait_command("submit", count=4)
        replica.running.clear()
        call.cancel()
        await replica.wait_command("cancel", count=4)
    cancelled = sorted(command.cancel.request_id for command in replica.received("cancel"))
    assert cancelled == [1, 2, 3, 4]


async def test_one_choice_that_fails_ends_the_answer(router: TestRouter) -> None:
    async with router.replica() as replica:
        call = router.inference.Generate(make_choices(3, max_tokens=500))
        await replica.wait_command("submit", count=3)
        replica.running.clear()
        await replica.refuse(2, link.SequenceError(code="INTERNAL", message="not finite"))
        error = await fail(call)
        await replica.wait_command("cancel", count=2)
    assert error.code() is grpc.StatusCode.INTERNAL


def of_seed(submit: link.Submit, pos: int) -> int:
    """A token that no other choice has there."""
    return hash_token([submit.sampling.seed % 2**32], pos, vocab_size=VOCAB_SIZE)


def expected(index: int) -> list[int]:
    seed = choice_seed(5, index) % 2**32
    return [hash_token([seed], pos, vocab_size=VOCAB_SIZE) for pos in range(LONG)]


@pytest.mark.parametrize("num_steps", [1, 4])
async def test_every_choice_goes_on_at_another_replica(router: TestRouter, num_steps: int) -> None:
    async with router.replica(replica_id="old", tokens=of_seed) as old, asyncio.timeout(WAIT_S):
        old.running.clear()
        call = router.inference.Generate(make_choices(3, max_tokens=LONG))
        await old.wait_command("submit")
        await old.step()
        await old.wait_command("submit", count=3)
        for _ in range(num_steps - 1):
            await old.step()
        async with router.replica(replica_id="new", tokens=of_seed) as new:
            await old.end(Fate.DRAINED)
            choices, final = await collect_choices(call)
            moved = [command.submit for command in new.received("submit")]
    assert [choice.token_ids for choice in choices] == [expected(index) for index in range(3)]
    assert (final.attempts, list(final.resumed_at)) == (2, [num_steps, num_steps - 1, num_steps - 1])
    assert [submit.attempt for submit in moved] == [1, 1, 1]
    assert final.usage.completion_tokens == 3 * LONG


async def test_one_choice_moves_and_the_others_stay(router: TestRouter) -> None:
    async with router.replica(replica_id="old", tokens=of_seed) as old, asyncio.timeout(WAIT_S):
        old.running.clear()
        call = router.inference.Generate(make_choices(3, max_tokens=LONG))
        await old.wait_command("submit")
        await old.step()
        refused = (await old.wait_command("submit", count=3)).submit
        async with router.replica(replica_id="new", tokens=of_seed) as new:
            error = link.SequenceError(code="UNAVAILABLE", message="draining")
            await old.refuse(refused.request_id, error)
            await new.wait_command("submit")
            old.running.set()
            choices, final = await collect_choices(call)
            assert len(new.received("submit")) == 1
    assert [choice.token_ids for choice in choices] == [expected(index) for index in range(3)]
    assert (final.attempts, list(final.resumed_at)) == (2, [0])


@pytest.mark.parametrize("fate", [Fate.FAILED, Fate.FROZEN])
async def test_choices_that_have_not_begun_follow_the_first_to_another_replica(fate: Fate) -> None:
    config = make_config(router={"failover": {"freeze_s": 1.0}})
    async with run_test_router(config) as router, asyncio.timeout(WAIT_S):
        old = router.replica(replica_id="old", tokens=of_seed)
        await old.attach()
        old.running.clear()
        old.fate, old.fate_after = fate, 1
        call = router.inference.Generate(make_choices(3, max_tokens=LONG))
        await old.wait_command("submit")
        async with router.replica(replica_id="new", tokens=of_seed):
            old.running.set()
            choices, _ = await collect_choices(call)
        await old.leave()
    assert [choice.token_ids for choice in choices] == [expected(index) for index in range(3)]


@pytest.mark.parametrize("fate", [Fate.FAILED, Fate.DRAINED])
async def test_choices_follow_a_first_that_had_no_token_yet(router: TestRouter, fate: Fate) -> None:
    async with router.replica(replica_id="old", tokens=of_seed) as old, asyncio.timeout(WAIT_S):
        old.running.clear()
        call = router.inference.Generate(make_choices(3, max_tokens=LONG))
        await old.wait_command("submit")
        async with router.replica(replica_id="new", tokens=of_seed):
            await old.end(fate)
            choices, _ = await collect_choices(call)
    assert [choice.token_ids for choice in choices] == [expected(index) for index in range(3)]


async def test_choices_wait_for_a_replica_where_the_one_of_a_first_that_is_done_was_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_lost = asyncio.Event()

    async def accept() -> None:
        await is_lost.wait()

    monkeypatch.setattr(service, "Caller", lambda **fields: Caller(**{**fields, "accept": accept}))
    config = make_config(router={"failover": {"wait_s": WAIT_S}})
    async with run_test_router(config) as router, asyncio.timeout(WAIT_S):
        old = router.replica(epoch=1, tokens=of_seed)
        await old.attach()
        old.fate, old.fate_after = Fate.FAILED, 1
        call = router.inference.Generate(make_choices(3, max_tokens=1))
        await old.wait_command("submit")
        while router.router._pool.ready(MODEL):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        is_lost.set()
        async with router.replica(epoch=2, tokens=of_seed):
            choices, _ = await collect_choices(call)
    assert [choice.token_ids for choice in choices] == [expected(index)[:1] for index in range(3)]


async def test_a_request_counts_once_whatever_its_choices() -> None:
    config = make_config(router={"max_streams": 1})
    async with run_test_router(config) as router, router.replica() as replica:
        replica.running.clear()
        call = router.inference.Generate(make_choices(3))
        await replica.wait_command("submit")
        error = await fail(router.inference.Generate(make_request()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        replica.running.set()
        choices, _ = await collect_choices(call)
    assert len(choices) == 3
