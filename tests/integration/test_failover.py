"""Streams that lose their replica and go on at another: no token lost or doubled, one end, honest figures."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from protos import wattline_inference_pb2 as pb
from protos import wattline_link_pb2 as link
from replicas.supervisor.in_flight import PROOF_TOKENS
from tests.fake_replica import MJ_PER_TOKEN, FakeReplica, Fate, hash_token
from tests.router_fixture import (
    VOCAB_SIZE,
    Answer,
    TestRouter,
    collect,
    decode,
    error_details,
    fail,
    make_config,
    make_request,
    run_test_router,
    spell,
)

WAIT_S = 150.0
LONG = 40
PATIENT = {"freeze_s": WAIT_S}
"""A test process that pauses takes no replica for frozen."""
IMPATIENT = {"freeze_s": 1.0}
"""Twice what one pause can add to a silence, however long it is."""


def expected(text: str = "hello", count: int = LONG) -> list[int]:
    """The tokens of an answer that nothing interrupted."""
    return [hash_token(spell(text), pos, vocab_size=VOCAB_SIZE) for pos in range(count)]


@pytest.fixture
async def router(request: pytest.FixtureRequest) -> AsyncIterator[TestRouter]:
    """Impatient with replicas where the test asks for it."""
    failover = getattr(request, "param", PATIENT)
    async with run_test_router(make_config(router={"failover": failover})) as running:
        yield running


async def metric(router: TestRouter, reason: str) -> float:
    """How many streams were moved for this reason."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{router.addresses.http}/metrics", timeout=WAIT_S) as answer:
            return str(answer.read(), "utf-8")

    name = f'wattline_failovers_total{{model="tiny",reason="{reason}"}} '
    lines = (await asyncio.to_thread(read)).splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.mark.parametrize(
    ("router", "fate", "reason"),
    [
        (PATIENT, Fate.KILLED, "killed"),
        (PATIENT, Fate.FAILED, "failed"),
        (PATIENT, Fate.DRAINED, "drained"),
        (PATIENT, Fate.LOST_WHILE_DRAINING, "failed"),
        (IMPATIENT, Fate.FROZEN, "frozen"),
    ],
    indirect=["router"],
)
async def test_a_stream_goes_on_where_its_replica_stopped(
    router: TestRouter, fate: Fate, reason: str
) -> None:
    old = router.replica(replica_id="old", step_s=0.01)
    new = router.replica(replica_id="new")
    async with asyncio.timeout(WAIT_S):
        await old.attach()
        old.running.clear()
        old.fate, old.fate_after = fate, 7
        call = router.inference.Generate(make_request(max_tokens=LONG))
        await old.wait_command("submit")
        await new.attach()
        old.running.set()
        answer = await collect(call)
    assert answer.token_ids == expected()
    assert answer.text == decode(expected())
    assert answer.deltas[-1].finish_reason == pb.FINISH_REASON_LENGTH
    (resumed_at,) = answer.final.resumed_at
    submit = new.received("submit")[0].submit
    assert (submit.attempt, submit.first_offset, submit.max_tokens) == (1, resumed_at, LONG - resumed_at)
    assert list(submit.prompt_ids) == [*spell("hello"), *expected(count=resumed_at)]
    # What was on its way when a process is killed may be lost, and is made again.
    assert resumed_at == 7 or fate is Fate.KILLED
    usage = answer.final.usage
    assert (answer.final.attempts, usage.prompt_tokens, usage.completion_tokens) == (2, 5, LONG)
    assert usage.wasted_tokens == 5 + resumed_at
    assert await metric(router, reason) == 1.0
    await old.leave()
    await new.leave()


@pytest.mark.parametrize("router", [IMPATIENT], indirect=True)
async def test_what_a_frozen_replica_says_later_is_dropped_but_for_its_joules(router: TestRouter) -> None:
    async with router.replica(replica_id="old") as old, asyncio.timeout(WAIT_S):
        old.fate, old.fate_after = Fate.FROZEN, 5
        call = router.inference.Generate(make_request(max_tokens=LONG))
        await old.wait_command("submit")
        async with router.replica(replica_id="new", step_s=0.02) as new:
            await new.wait_command("submit")
            await old.thaw()
            await old.wait_command("cancel")
            answer = await collect(call)
            assert answer.token_ids == expected()
            assert answer.text == decode(expected())
            assert list(answer.final.resumed_at) == [5]
            assert answer.final.energy.state == pb.ENERGY_STATE_PROVISIONAL
            assert answer.final.energy.total_j == (1000 + MJ_PER_TOKEN * (LONG - 5)) / 1e3
            assert answer.final.energy.wasted_j == 1.0
            late = link.RequestEnergy(
                request_id=1,
                prefill_mj=1000,
                decode_mj=1250,
                source="fake",
                confidence_factor=1.0,
                final=True,
            )
            await old.send(link.FromReplica(energy=link.EnergyReport(requests=[late])))
            while True:
                asked = pb.GetEnergyRequest(request_id=answer.final.request_id)
                energy = (await router.inference.GetEnergy(asked)).energy
                if energy.state == pb.ENERGY_STATE_FINAL:
                    break
                await asyncio.sleep(0.01)
            assert energy.total_j == (2000 + MJ_PER_TOKEN * LONG) / 1e3
            again = await collect(router.inference.Generate(make_request("again", max_tokens=8)))
            assert again.token_ids == expected("again", 8)


async def test_stop_texts_and_characters_go_on_across_replicas(router: TestRouter) -> None:
    tokens = spell("naïve café END never")
    cut = len(spell("naïve caf")) + 1  # In the middle of a character.

    def say(submit: link.Submit, pos: int) -> int:
        return tokens[min(pos, len(tokens) - 1)]

    async with router.replica(replica_id="old", tokens=say) as old, asyncio.timeout(WAIT_S):
        old.running.clear()
        old.fate, old.fate_after = Fate.FAILED, cut
        call = router.inference.Generate(make_request(max_tokens=50, stop=["é END"]))
        await old.wait_command("submit")
        async with router.replica(replica_id="new", tokens=say):
            old.running.set()
            answer = await collect(call)
    assert answer.text == "naïve caf"
    assert answer.deltas[-1].finish_reason == pb.FINISH_REASON_STOP
    assert list(answer.final.resumed_at) == [cut]


@pytest.mark.parametrize(
    "fields",
    [{"weights_digest": "other"}, {"tokenizer_digest": "other"}, {"context_tokens": 16}],
    ids=["weights", "tokenizer", "context"],
)
async def test_only_an_equal_replica_goes_on(router: TestRouter, fields: dict[str, Any]) -> None:
    async with router.replica(replica_id="old") as old, asyncio.timeout(WAIT_S):
        old.running.clear()
        call = router.inference.Generate(make_request(max_tokens=LONG))
        await old.wait_command("submit")
        async with router.replica(replica_id="new", **fields) as new:
            await old.end(Fate.KILLED)
            error = await fail(call)
            assert new.received("submit") == []
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "RetryInfo" in error_details(error)


async def test_a_stream_waits_for_a_replica_as_long_as_it_may() -> None:
    config = make_config(router={"failover": {**PATIENT, "wait_s": 60.0}})
    async with run_test_router(config) as router, asyncio.timeout(WAIT_S):
        old = router.replica(epoch=1)
        await old.attach()
        old.running.clear()
        old.fate, old.fate_after = Fate.KILLED, 6
        call = router.inference.Generate(make_request(max_tokens=LONG))
        late = router.inference.Generate(make_request(max_tokens=LONG), timeout=1.0)
        # However late they are: `late` ends like this wherever it is.
        await asyncio.gather(call.initial_metadata(), late.initial_metadata())
        old.running.set()
        assert (await fail(late)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with router.replica(epoch=2):
            assert (await collect(call)).token_ids == expected()


async def test_a_refused_request_goes_to_another_replica_before_its_first_token(router: TestRouter) -> None:
    async with router.replica(replica_id="old") as old, asyncio.timeout(WAIT_S):
        old.running.clear()
        call = router.inference.Generate(make_request(max_tokens=LONG))
        submit = (await old.wait_command("submit")).submit
        async with router.replica(replica_id="new"):
            refusal = link.SequenceDelta(
                request_id=submit.request_id,
                finish=link.ENGINE_FINISH_ERROR,
                error=link.SequenceError(code="UNAVAILABLE", message="draining"),
            )
            await old.send(link.FromReplica(step=link.StepOutput(deltas=[refusal])))
            answer = await collect(call)
    assert (answer.token_ids, list(answer.final.resumed_at)) == (expected(), [0])
    assert answer.final.usage.wasted_tokens == 0


async def test_a_spent_budget_is_unavailable_with_a_time_to_come_back() -> None:
    config = make_config(router={"failover": {**PATIENT, "burst": 1, "budget_ratio": 0.0}})
    async with run_test_router(config) as router, asyncio.timeout(WAIT_S):
        old = router.replica(replica_id="old")
        await old.attach()
        old.running.clear()
        calls = [router.inference.Generate(make_request(f"n{i}", max_tokens=LONG)) for i in range(2)]
        await old.wait_command("submit", count=2)
        async with router.replica(replica_id="new"):
            await old.end(Fate.DRAINED)
            endings = await asyncio.gather(*(collect(call) for call in calls), return_exceptions=True)
    (error,) = [ending for ending in endings if isinstance(ending, grpc.aio.AioRpcError)]
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == (
        "the replica serving this request stopped, and this router moves no more streams for now; retry"
    )
    assert "RetryInfo" in error_details(error)


async def hop(router: TestRouter, fates: list[Fate]) -> tuple[Any, FakeReplica]:
    """A call whose replicas meet these fates one after another, and the replica that is there at the end.

    No replica steps by itself; each of them gives three tokens.
    """
    current = router.replica(replica_id="0")
    await current.attach()
    current.running.clear()
    call = router.inference.Generate(make_request(max_tokens=LONG))
    for number, fate in enumerate(fates, 1):
        await current.wait_command("submit")
        for _ in range(3):
            await current.step()
        following = router.replica(replica_id=str(number))
        await following.attach()
        following.running.clear()
        await current.end(fate)
        current = following
    return call, current


async def test_a_stream_is_moved_twice_at_most(router: TestRouter) -> None:
    async with asyncio.timeout(WAIT_S):
        call, last = await hop(router, [Fate.DRAINED, Fate.FAILED])
        await last.wait_command("submit")
        last.running.set()
        answer = await collect(call)
        assert answer.token_ids == expected()
        assert (answer.final.attempts, len(answer.final.resumed_at)) == (3, 2)
        await last.leave()
        call, last = await hop(router, [Fate.DRAINED, Fate.DRAINED, Fate.DRAINED])
        error = await fail(call)
        await last.leave()
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "a request is moved 2 times at most" in (error.details() or "")


async def test_a_prompt_that_two_replicas_died_of_is_quarantined(router: TestRouter) -> None:
    async with asyncio.timeout(WAIT_S):
        call, last = await hop(router, [Fate.FAILED, Fate.KILLED])
        error = await fail(call)
        again = await fail(router.inference.Generate(make_request(max_tokens=3)))
        assert last.received("submit") == []
        last.running.set()
        assert (await collect(router.inference.Generate(make_request("hi")))).token_ids == expected("hi", 8)
        await last.leave()
    for each in (error, again):
        assert each.code() is grpc.StatusCode.ABORTED
        assert each.details() == ("replicas stopped while serving this prompt; it is refused for ten minutes")


async def test_a_second_death_is_one_request_s_fault_and_the_others_go_on(router: TestRouter) -> None:
    """Three requests died before a token: they go on one at a time, each behind a few tokens of the last."""
    texts = ["a", "b", "c"]
    old, new, third = (router.replica(replica_id=name) for name in ("old", "new", "third"))
    async with asyncio.timeout(WAIT_S):
        await old.attach()
        old.running.clear()
        calls = [router.inference.Generate(make_request(text, max_tokens=LONG)) for text in texts]
        await old.wait_command("submit", count=3)
        await new.attach()
        new.running.clear()
        await old.end(Fate.FAILED)
        await new.wait_command("submit")
        for _ in range(PROOF_TOKENS):
            assert len(new.received("submit")) == 1
            await new.step()
        culprit = (await new.wait_command("submit", count=2)).submit
        assert len(new.received("submit")) == 2
        await third.attach()
        await new.end(Fate.KILLED)
        endings = await asyncio.gather(*(collect(call) for call in calls), return_exceptions=True)
        await third.leave()
    for text, ending in zip(texts, endings, strict=True):
        if list(culprit.prompt_ids) == list(spell(text)):
            assert isinstance(ending, grpc.aio.AioRpcError) and ending.code() is grpc.StatusCode.ABORTED
        else:
            assert isinstance(ending, Answer) and ending.token_ids == expected(text)


async def test_a_death_that_another_router_s_request_may_have_caused_is_nobody_s_fault(
    router: TestRouter,
) -> None:
    """The replica says that it had another suspect: the stream goes on, and only a third death would tell."""
    old, new, third = (router.replica(replica_id=name) for name in ("old", "new", "third"))
    async with asyncio.timeout(WAIT_S):
        await old.attach()
        old.running.clear()
        call = router.inference.Generate(make_request(max_tokens=LONG))
        await old.wait_command("submit")
        await new.attach()
        new.running.clear()
        await old.end(Fate.FAILED)
        await new.wait_command("submit")
        await third.attach()
        await new.send(link.FromReplica(goodbye=link.Goodbye(reason="test", num_unproven=2)))
        assert (await collect(call)).token_ids == expected()
        await new.leave(says_goodbye=False)
        await third.leave()
