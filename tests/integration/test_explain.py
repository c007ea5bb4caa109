"""What a router tells of a request that ended: every decision, every replica, and no text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from cluster.balancing.recording import read_decisions, replay
from cluster.cli import app
from protos import wattline_cluster_pb2 as cluster_pb
from tests.fake_replica import MJ_PER_TOKEN, Fate
from tests.router_fixture import (
    TestRouter,
    collect,
    collect_choices,
    fail,
    make_config,
    make_request,
    run_test_router,
)

WAIT_S = 150.0
NUM_AHEAD = 2
"""Requests that a replica with one row takes: one runs, one is next."""
SECRET = "nobody may read this"


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    async with asyncio.timeout(WAIT_S), run_test_router() as running:
        yield running


async def explain(router: TestRouter, request_or_trace_id: str) -> list[cluster_pb.RequestStory]:
    answer = await router.cluster.Explain(cluster_pb.ExplainRequest(id=request_or_trace_id))
    return list(answer.stories)


async def until_queued(router: TestRouter, count: int) -> None:
    while router.num_queued != count:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_an_answer_has_its_story_by_request_and_by_trace(router: TestRouter) -> None:
    async with router.replica(replica_id="a", host_mj=700), router.replica(replica_id="b", host_mj=700):
        answer = await collect(router.inference.Generate(make_request(SECRET), timeout=3600.0))
        (story,) = await explain(router, answer.final.request_id)
        while not story.energy.is_final:
            (story,) = await explain(router, answer.final.request_id)
        (same,) = await explain(router, answer.final.trace_id)
    assert same.request_id == story.request_id == answer.final.request_id
    assert (story.model, story.tenant, story.outcome, story.refusal) == ("tiny", "default", "length", "")
    assert (story.prompt_tokens, story.output_tokens) == (len(SECRET), 8)
    assert story.arrival.max_streams > story.arrival.in_flight
    assert not story.HasField("queue")
    assert 0.0 < story.slack_ms < story.deadline_ms
    assert (story.energy.prefill_j, story.energy.decode_j) == (1.0, 8 * MJ_PER_TOKEN / 1e3)
    assert story.energy.host_j == story.legs[0].energy.host_j == 0.7
    (leg,) = story.legs
    assert (leg.output_tokens, leg.first_offset, leg.loss) == (8, 0, "")
    assert leg.submitted_ms <= leg.first_token_ms <= leg.last_token_ms <= story.total_ms
    assert (leg.batches.steps, leg.batches.min, leg.batches.max) == (8, 1, 1)
    assert (leg.trail.first_step, leg.trail.last_step, leg.trail.longest_gap.step) == (1, 8, 8)
    (chosen,) = (one for one in leg.choice.candidates if one.is_chosen)
    assert chosen.replica_id == leg.replica_id
    assert sorted(one.replica_id for one in leg.choice.candidates) == ["a", "b"]
    assert not any(one.HasField("added_j") for one in leg.choice.candidates), "nobody said its watts"
    assert SECRET.encode() not in story.SerializeToString()


async def test_what_is_recorded_is_chosen_again(router: TestRouter) -> None:
    async with router.replica(replica_id="a"), router.replica(replica_id="b"):
        answers = [await collect(router.inference.Generate(make_request())) for _ in range(6)]
        stories = [(await explain(router, answer.final.request_id))[0] for answer in answers]
    for story in stories:
        (decision,) = read_decisions(story.recording)
        assert replay(decision) == decision.choice
        chosen = decision.question.candidates[decision.choice.index].lane
        assert chosen.replica_id == story.legs[0].replica_id


async def test_a_failover_is_two_legs_and_its_reason(router: TestRouter) -> None:
    async with router.replica(replica_id="old", step_s=0.01) as old:
        old.running.clear()
        old.fate, old.fate_after = Fate.FAILED, 7
        call = router.inference.Generate(make_request(max_tokens=40))
        await old.wait_command("submit")
        async with router.replica(replica_id="new"):
            old.running.set()
            answer = await collect(call)
            (story,) = await explain(router, answer.final.request_id)
    first, second = story.legs
    assert (first.replica_id, first.loss, first.output_tokens) == ("old", "failed", 7)
    assert (second.replica_id, second.loss, second.first_offset) == ("new", "", 7)
    assert first.output_tokens + second.output_tokens == story.output_tokens == 40
    assert [one.replica_id for one in second.choice.candidates] == ["new"]
    assert (first.HasField("trail"), second.HasField("trail")) == (False, True)
    assert len(read_decisions(story.recording)) == 2


async def test_batch_mates_are_counted(router: TestRouter) -> None:
    async with router.replica() as replica:
        replica.running.clear()
        calls = [router.inference.Generate(make_request(ignore_eos=True)) for _ in range(3)]
        await replica.wait_command("submit", count=3)
        replica.running.set()
        answers = await asyncio.gather(*(collect(call) for call in calls))
        (story,) = await explain(router, answers[0].final.request_id)
    mates = story.legs[0].batches
    assert (mates.steps, mates.min, mates.median, mates.max) == (8, 3, 3, 3)


async def test_choices_beside_each_other_have_a_leg_each(router: TestRouter) -> None:
    async with router.replica():
        request = make_request()
        request.sampling.n = 2
        _, final = await collect_choices(router.inference.Generate(request))
        (story,) = await explain(router, final.request_id)
    assert [(leg.choice_index, leg.HasField("choice")) for leg in story.legs] == [(0, True), (1, False)]
    assert all(leg.HasField("trail") for leg in story.legs)


async def test_who_waited_is_told_what_the_queue_knew() -> None:
    async with (
        asyncio.timeout(WAIT_S),
        run_test_router() as router,
        router.replica(max_sequences=1) as replica,
    ):
        replica.running.clear()
        calls = [router.inference.Generate(make_request()) for _ in range(6)]
        await until_queued(router, len(calls) - NUM_AHEAD)
        replica.running.set()
        answers = await asyncio.gather(*(collect(call) for call in calls))
        stories = [(await explain(router, answer.final.request_id))[0] for answer in answers]
    waited = [story for story in stories if story.HasField("queue")]
    assert waited and all(story.queue.queued < story.queue.max_queued for story in waited)


async def test_a_refusal_names_its_limit() -> None:
    async with (
        asyncio.timeout(WAIT_S),
        run_test_router(make_config(router={"max_streams": 1})) as router,
        router.replica() as replica,
    ):
        replica.running.clear()
        call = router.inference.Generate(make_request())
        await replica.wait_command("submit")
        refused = await fail(router.inference.Generate(make_request(SECRET)))
        metadata = dict(refused.trailing_metadata() or ())
        (story,) = await explain(router, str(metadata["wattline-request-id"]))
        call.cancel()
    assert story.outcome == "RESOURCE_EXHAUSTED"
    assert "1 streams are in flight, the router's limit" in story.refusal
    assert not story.legs and not story.recording


async def test_a_request_that_nobody_remembers_is_not_found(router: TestRouter) -> None:
    error = await fail(router.cluster.Explain(cluster_pb.ExplainRequest(id="nope")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "remembered" in (error.details() or "")


async def test_the_command_tells_the_story_and_records_the_decision(
    router: TestRouter, tmp_path: Path
) -> None:
    path = tmp_path / "decision.json"
    async with router.replica(replica_id="the-one"):
        answer = await collect(router.inference.Generate(make_request(SECRET)))
        ask = ["why", answer.final.request_id, "--address", router.addresses.grpc]
        told = await asyncio.to_thread(CliRunner().invoke, app, ask)
        again = await asyncio.to_thread(CliRunner().invoke, app, [*ask, "--json", "--record", str(path)])
    assert told.exit_code == again.exit_code == 0, told.output + again.output
    for word in (
        *("the-one", "limits:", "queue: none", "joules:", "policy least_loaded", "TTFT"),
        "steps 1 to 8 of its engine: 1 of prefill, 7 of decode",
        "longest gap between tokens 1.0 ms, ended by step 8",
    ):
        assert word in told.output
    (story,) = json.loads(again.output)
    assert story["request_id"] == answer.final.request_id
    (decision,) = read_decisions(path.read_text())
    assert replay(decision) == decision.choice
    assert SECRET not in told.output + again.output + path.read_text()


TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACE = (("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"),)
PATIENCE_S = 3.0


@pytest.mark.parametrize("is_late", [False, True], ids=["given up", "late"])
async def test_who_left_the_queue_has_a_story_too(is_late: bool) -> None:
    """It is found by its trace: who hangs up learns no id."""
    async with (
        asyncio.timeout(WAIT_S),
        run_test_router() as router,
        router.replica(max_sequences=1) as replica,
    ):
        replica.running.clear()
        before = [router.inference.Generate(make_request()) for _ in range(6)]
        await replica.wait_command("submit", count=NUM_AHEAD)
        await until_queued(router, len(before) - NUM_AHEAD)
        timeout_s = PATIENCE_S if is_late else None
        call = router.inference.Generate(make_request(SECRET), metadata=TRACE, timeout=timeout_s)
        await until_queued(router, len(before) - NUM_AHEAD + 1)
        if is_late:
            assert (await fail(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            call.cancel()
        story = await story_of_trace(router)
        for one in before:
            one.cancel()
    assert not story.legs and story.arrival.in_flight == len(before) and story.HasField("queue")
    assert SECRET.encode() not in story.SerializeToString()
    if is_late:
        assert story.outcome == "DEADLINE_EXCEEDED"
        assert story.slack_ms < story.deadline_ms
    else:
        assert (story.outcome, story.HasField("slack_ms")) == ("cancelled", False)
        assert story.refusal == "its caller gave it up before a replica had it"


async def story_of_trace(router: TestRouter) -> cluster_pb.RequestStory:
    """Once the router has noticed."""
    while True:
        try:
            (story,) = await explain(router, TRACE_ID)
            return story
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND
            await asyncio.sleep(0.02)
