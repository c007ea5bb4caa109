"""Requests through a whole router over real gRPC: answers, stops, refusals, cancels, joules. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from protos import wattline_inference_pb2 as pb
from protos import wattline_link_pb2 as link
from tests.fake_replica import EOS, MJ_PER_TOKEN, EnergyMode
from tests.router_fixture import (
    MODEL,
    TestRouter,
    collect,
    decode,
    error_details,
    fail,
    make_config,
    make_request,
    run_test_router,
    script,
    spell,
)

WAIT_S = 150.0


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    async with run_test_router() as running:
        yield running


async def test_an_answer_is_deltas_then_one_final_with_usage_timing_and_joules(router: TestRouter) -> None:
    async with router.replica():
        answer = await collect(router.inference.Generate(make_request("hi", energy_wait_ms=1000)))
    assert len(answer.token_ids) == 8
    assert answer.text == decode(answer.token_ids)
    assert answer.deltas[-1].finish_reason == pb.FINISH_REASON_LENGTH
    usage = answer.final.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.wasted_tokens) == (2, 8, 0)
    energy = answer.final.energy
    assert energy.state == pb.ENERGY_STATE_FINAL
    assert energy.total_j == pytest.approx((1000 + 8 * MJ_PER_TOKEN) / 1e3)
    assert energy.joules_per_output_token == pytest.approx(energy.total_j / 8)
    assert energy.joules_per_total_token == pytest.approx(energy.total_j / 10)
    assert (energy.source, energy.method) == ("fake", "step-ledger/1")
    assert answer.final.timing.prefill_ms == 2.0
    assert 0.0 < answer.final.timing.ttft_ms <= answer.final.timing.total_ms


async def test_ids_and_joules_are_in_the_metadata_too(router: TestRouter) -> None:
    async with router.replica():
        answer = await collect(router.inference.Generate(make_request(energy_wait_ms=1000)))
    assert answer.trailers["wattline-energy-joules"] == "3.000"
    assert answer.trailers["wattline-energy-source"] == "fake"
    assert answer.trailers["wattline-energy-state"] == "final"
    ids = (answer.final.request_id, answer.final.trace_id)
    assert all(ids)
    for metadata in (answer.headers, answer.trailers):
        assert (metadata["wattline-request-id"], metadata["wattline-trace-id"]) == ids


async def test_chat_goes_through_the_template(router: TestRouter) -> None:
    messages = [pb.Message(role="system", content="be brief"), pb.Message(role="user", content="hi")]
    async with router.replica() as replica:
        answer = await collect(
            router.inference.Chat(
                pb.ChatRequest(model=MODEL, messages=messages, limits=pb.Limits(max_tokens=3))
            )
        )
        submit = (await replica.wait_command("submit")).submit
    assert len(answer.token_ids) == 3
    assert decode(submit.prompt_ids) == "<system>be brief\n<user>hi\n<assistant>"
    assert submit.sampling.temperature == 1.0
    assert submit.traceparent.startswith(f"00-{answer.final.trace_id}-")


async def test_tokens_in_and_tokens_back_are_the_same_as_text(router: TestRouter) -> None:
    ids = (await router.inference.Tokenize(pb.TokenizeRequest(model=MODEL, text="hello"))).token_ids
    assert tuple(ids) == spell("hello")
    text = (await router.inference.Detokenize(pb.DetokenizeRequest(model=MODEL, token_ids=ids))).text
    assert text == "hello"
    async with router.replica():
        by_text = await collect(router.inference.Generate(make_request("hello")))
        request = make_request()
        request.tokens.ids.extend(ids)
        by_ids = await collect(router.inference.Generate(request))
    assert by_text.token_ids == by_ids.token_ids


async def test_a_conversation_can_be_tokenised_without_asking_the_model(router: TestRouter) -> None:
    conversation = pb.Conversation(messages=[pb.Message(role="user", content="hi")])
    answer = await router.inference.Tokenize(pb.TokenizeRequest(model=MODEL, conversation=conversation))
    assert decode(answer.token_ids) == "<user>hi\n<assistant>"


@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
async def test_a_stop_text_across_tokens_ends_the_answer_before_it(tokens_per_step: int) -> None:
    async with run_test_router() as router:
        tokens = script(*spell("one END two"))
        async with router.replica(tokens=tokens, tokens_per_step=tokens_per_step) as replica:
            # In one step, or so many that none of them is the last before the stop has come down.
            max_tokens = 50 if tokens_per_step == 50 else 4000
            call = router.inference.Generate(make_request(max_tokens=max_tokens, stop=["END", "never"]))
            answer = await collect(call)
            if tokens_per_step < 50:
                await replica.wait_command("stop")
    assert answer.text == "one "
    assert answer.deltas[-1].finish_reason == pb.FINISH_REASON_STOP
    assert answer.final.usage.completion_tokens == len("one END")
    if tokens_per_step == 50:
        assert answer.final.usage.wasted_tokens == 50 - len("one END")


async def test_half_a_stop_text_at_the_end_is_sent(router: TestRouter) -> None:
    async with router.replica(tokens=script(*spell("one EN"))):
        answer = await collect(router.inference.Generate(make_request(max_tokens=6, stop=["END"])))
    assert answer.text == "one EN"
    assert answer.deltas[-1].finish_reason == pb.FINISH_REASON_LENGTH


async def test_the_end_of_text_token_stops_unless_it_is_ignored(router: TestRouter) -> None:
    async with router.replica(tokens=script(*spell("ab"), EOS)):
        stopped = await collect(router.inference.Generate(make_request(max_tokens=5)))
        ignored = await collect(router.inference.Generate(make_request(max_tokens=5, ignore_eos=True)))
    assert (stopped.text, stopped.token_ids) == ("ab", [*spell("ab"), EOS])
    assert stopped.deltas[-1].finish_reason == pb.FINISH_REASON_STOP
    assert ignored.token_ids == [*spell("ab"), EOS, EOS, EOS]
    assert ignored.deltas[-1].finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_character_is_never_sent_in_halves(router: TestRouter) -> None:
    text = "naïve 日本語 🙂 café"
    async with router.replica(tokens=script(*spell(text))):
        answer = await collect(router.inference.Generate(make_request(max_tokens=len(text.encode()))))
    assert answer.text == text
    assert not any("\ufffd" in delta.text for delta in answer.deltas)


async def test_max_tokens_defaults_to_what_the_context_leaves() -> None:
    config = make_config(model={"limits": {"max_output_tokens": 4000}})
    async with run_test_router(config) as router, router.replica(context_tokens=20):
        request = make_request("12345")
        request.limits.ClearField("max_tokens")
        answer = await collect(router.inference.Generate(request))
    assert answer.final.usage.completion_tokens == 15


BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("prompt.text", {"text": ""}),
    ("prompt.text", {"text": "x" * (1 << 20) + "x"}),
    ("sampling.temperature", {"sampling": pb.Sampling(temperature=-0.1)}),
    ("sampling.temperature", {"sampling": pb.Sampling(temperature=float("nan"))}),
    ("sampling.top_p", {"sampling": pb.Sampling(top_p=0.0)}),
    ("sampling.n", {"sampling": pb.Sampling(n=9)}),
    ("limits.max_tokens", {"max_tokens": 0}),
    ("limits.max_tokens", {"max_tokens": 1_000_000}),
    ("limits.stop", {"stop": ["x"] * 17}),
    ("limits.stop[1]", {"stop": ["x", ""]}),
    ("limits.stop_token_ids", {"stop_token_ids": [1000]}),
    ("priority", {"priority": 101}),
    ("energy_wait_ms", {"energy_wait_ms": 1001}),
    ("prompt", {"text": "x" * 4096}),
]


ENGINE_CODES = {
    "INVALID_ARGUMENT": grpc.StatusCode.INVALID_ARGUMENT,
    "RESOURCE_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "WHATEVER": grpc.StatusCode.INTERNAL,
}


async def test_bad_fields_are_named_and_never_reach_a_replica(router: TestRouter) -> None:
    async with router.replica() as replica:
        for field, values in BAD_FIELDS:
            error = await fail(router.inference.Generate(make_request(**values)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (error.details() or "").startswith(f"{field}: got ")
            assert error_details(error)["BadRequest"].field_violations[0].field == field
        assert not replica.received("submit")


async def test_an_unknown_model_is_not_found(router: TestRouter) -> None:
    error = await fail(router.inference.Generate(make_request(model="gpt-9")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "model: got 'gpt-9'; allowed: tiny, absent; name one that is served here"
    assert error_details(error)["ResourceInfo"].resource_name == "gpt-9"


async def test_no_replica_is_unavailable_and_says_when_to_retry(router: TestRouter) -> None:
    error = await fail(router.inference.Generate(make_request(model="absent")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error_details(error)["RetryInfo"].retry_delay.seconds == 1


async def test_over_the_stream_limit_is_refused_with_a_pushback() -> None:
    config = make_config(router={"max_streams": 1})
    async with run_test_router(config) as router, router.replica() as replica:
        replica.running.clear()
        first = router.inference.Generate(make_request())
        await replica.wait_command("submit")
        error = await fail(router.inference.Generate(make_request()))
        replica.running.set()
        assert len((await collect(first)).token_ids) == 8
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]) >= 50
    assert error_details(error)["RetryInfo"].retry_delay.ToMilliseconds() >= 50


async def fail_first(*calls: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> Any:
    """The error of the call that fails first; the others are cancelled."""
    failing = [asyncio.ensure_future(fail(call)) for call in calls]
    done, left = await asyncio.wait(failing, return_when=asyncio.FIRST_COMPLETED)
    for call in calls:
        call.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    return done.pop().result()


async def test_full_replicas_refuse() -> None:
    """One runs, one is next in the engine, one waits in the router: no more."""
    config = make_config(model={"limits": {"max_queued": 1}})
    async with run_test_router(config) as router, router.replica(max_sequences=1) as replica:
        replica.running.clear()
        calls = [router.inference.Generate(make_request()) for _ in range(2)]
        await replica.wait_command("submit", count=2)
        error = await fail_first(*(router.inference.Generate(make_request()) for _ in range(2)))
        for call in calls:
            call.cancel()
        await replica.wait_command("cancel", count=2)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_cancel_reaches_the_replica(router: TestRouter) -> None:
    async with router.replica(step_s=0.001) as replica:
        call = router.inference.Generate(make_request(max_tokens=4000))
        await call.read()
        call.cancel()
        async with asyncio.timeout(WAIT_S):
            cancel = await replica.wait_command("cancel")
        assert cancel.cancel.request_id == replica.received("submit")[0].submit.request_id


async def test_the_deadline_goes_down_and_ends_the_call(router: TestRouter) -> None:
    async with router.replica() as replica:
        replica.running.clear()
        call = router.inference.Generate(make_request(), timeout=60.0)
        assert 0 < (await replica.wait_command("submit")).submit.deadline_ms <= 60_000
        error = await fail(router.inference.Generate(make_request(), timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        call.cancel()
        # Whether or not the late one came as far as the replica, nothing of it is there.
        while replica.load().running != [0]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_deadline_longer_than_the_wire_can_say_is_served_with_the_longest(router: TestRouter) -> None:
    async with router.replica() as replica:
        answer = await collect(router.inference.Generate(make_request(), timeout=1e9))
        assert (await replica.wait_command("submit")).submit.deadline_ms == 2**32 - 1
    assert answer.final.usage.completion_tokens == 8


async def test_a_deadline_seen_by_the_engine_first_is_the_same_error(router: TestRouter) -> None:
    async with router.replica() as replica:
        replica.running.clear()
        call = router.inference.Generate(make_request(), timeout=60)
        request_id = (await replica.wait_command("submit")).submit.request_id
        late = link.SequenceDelta(request_id=request_id, finish=link.ENGINE_FINISH_DEADLINE)
        await replica.send(link.FromReplica(step=link.StepOutput(deltas=[late])))
        error = await fail(call)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_engine_refusal_keeps_its_code_but_a_fault_no_details(router: TestRouter) -> None:
    async with router.replica() as replica:
        replica.running.clear()
        for count, (name, code) in enumerate(ENGINE_CODES.items(), start=1):
            call = router.inference.Generate(make_request())
            request_id = (await replica.wait_command("submit", count=count)).submit.request_id
            refusal = link.SequenceError(code=name, message="secret of rank 3")
            delta = link.SequenceDelta(request_id=request_id, finish=link.ENGINE_FINISH_ERROR, error=refusal)
            await replica.send(link.FromReplica(step=link.StepOutput(deltas=[delta])))
            error = await fail(call)
            assert error.code() is code
            if code is grpc.StatusCode.INTERNAL:
                assert "secret" not in (error.details() or "")


async def test_tokens_of_another_attempt_or_told_twice_are_dropped(router: TestRouter) -> None:
    async with router.replica() as replica:
        replica.running.clear()
        call = router.inference.Generate(make_request(max_tokens=3))
        submit = (await replica.wait_command("submit")).submit
        for attempt, first_offset, ids in ((0, 0, [10, 11]), (7, 2, [99]), (0, 0, [10, 11]), (0, 2, [12])):
            delta = link.SequenceDelta(
                request_id=submit.request_id, attempt=attempt, first_offset=first_offset, token_ids=ids
            )
            if ids == [12]:
                delta.finish = link.ENGINE_FINISH_LENGTH
            await replica.send(link.FromReplica(step=link.StepOutput(deltas=[delta])))
        answer = await collect(call)
    assert answer.token_ids == [10, 11, 12]


async def test_a_reader_that_stalls_is_cut_and_its_request_cancelled() -> None:
    config = make_config(
        router={"stall_buffer_bytes": 4096}, model={"limits": {"max_output_tokens": 1_000_000}}
    )
    async with run_test_router(config) as router:
        options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384))
        async with (
            router.replica(context_tokens=1_000_000, tokens_per_step=100) as replica,
            grpc.aio.insecure_channel(router.addresses.grpc, options=options) as channel,
        ):
            stub = type(router.inference)(channel)
            replica.running.clear()
            messages = aiter(stub.Generate(make_request(max_tokens=900_000)))
            await replica.wait_command("submit")
            await replica.step()
            await anext(messages)
            replica.running.set()
            async with asyncio.timeout(WAIT_S):
                await replica.wait_command("cancel")
                error = await fail(messages)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "slow consumer" in (error.details() or "")
    assert dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "-1"


async def test_late_joules_are_provisional_then_final_by_get_energy(router: TestRouter) -> None:
    async with router.replica(energy=EnergyMode.LATE) as replica:
        answer = await collect(router.inference.Generate(make_request(energy_wait_ms=20)))
        assert answer.final.energy.state == pb.ENERGY_STATE_PROVISIONAL
        assert answer.trailers["wattline-energy-state"] == "provisional"
        await replica.close_energy()
        request = pb.GetEnergyRequest(request_id=answer.final.request_id)
        known = await router.inference.GetEnergy(request)
        while known.energy.state != pb.ENERGY_STATE_FINAL:
            known = await router.inference.GetEnergy(request)
    assert known.energy.total_j == 3.0
    assert known.usage == answer.final.usage


async def test_joules_nobody_measured_are_unset_not_zero(router: TestRouter) -> None:
    async with router.replica(energy=EnergyMode.NEVER):
        answer = await collect(router.inference.Generate(make_request(energy_wait_ms=0)))
    assert not answer.final.energy.HasField("total_j")
    assert answer.final.energy.state == pb.ENERGY_STATE_PROVISIONAL
    assert "wattline-energy-joules" not in answer.trailers


async def test_an_answer_does_not_wait_for_joules_that_will_never_be_known(router: TestRouter) -> None:
    async with router.replica(energy=EnergyMode.UNKNOWN):
        answer = await collect(router.inference.Generate(make_request(energy_wait_ms=1000)))
        request = pb.GetEnergyRequest(request_id=answer.final.request_id)
        known = await router.inference.GetEnergy(request)
    assert answer.final.energy == known.energy == pb.Energy(state=pb.ENERGY_STATE_UNSPECIFIED)
    assert answer.trailers["wattline-energy-state"] == "unknown"


async def test_get_energy_of_an_unknown_request_is_not_found(router: TestRouter) -> None:
    error = await fail(router.inference.GetEnergy(pb.GetEnergyRequest(request_id="nope")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
