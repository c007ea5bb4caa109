"""What a router shows without being asked the Wattline way: reflection, metrics, probes, traces."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.message import Message
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from cluster.client import to_energy
from protos import wattline_inference_pb2 as pb
from protos import wattline_link_pb2 as link
from tests.collector import Collector, attributes, run_collector
from tests.fake_replica import EnergyMode, Fate
from tests.router_fixture import (
    MODEL,
    TestRouter,
    collect,
    fail,
    make_config,
    make_request,
    run_test_router,
)

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SECRET = "what the prompt says"


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    async with run_test_router() as running:
        yield running


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    async with run_collector() as running:
        yield running


async def get(router: TestRouter, path: str, **headers: str) -> tuple[int, str]:
    """Status and body of a GET."""

    def fetch() -> tuple[int, str]:
        request = Request(f"http://{router.addresses.http}{path}", headers=headers)
        try:
            with urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


def reflected(method: Any, kind: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    """A method of a descriptor, to be called with the fields of its request."""
    request_class = message_factory.GetMessageClass(method.input_type)
    response_class = message_factory.GetMessageClass(method.output_type)
    call = kind(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=response_class.FromString,
    )
    return lambda fields: call(json_format.ParseDict(fields, request_class()), timeout=60)


def infer_by_reflection(address: str) -> Any:
    """The same for the open inference protocol."""
    with grpc.insecure_channel(address) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ModelInfer")
        prompt = {"name": "text_input", "datatype": "BYTES", "shape": [1]}
        contents = {"contents": {"bytesContents": [base64.b64encode(b"hi").decode()]}}
        return reflected(method, channel.unary_unary)({"modelName": MODEL, "inputs": [prompt | contents]})


def call_by_reflection(address: str, models: Callable[[Any], str]) -> tuple[list[str], list[str]]:
    """A client that knows no proto of ours: lists services, asks for the models, and chats with one."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        service = pool.FindServiceByName("wattline.v1.Inference")

        def stub(method_name: str, kind: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
            return reflected(service.FindMethodByName(method_name), kind)

        model = models(stub("ListModels", channel.unary_unary)({}))
        request = {
            "model": model,
            "messages": [{"role": "user", "content": "hi"}],
            "limits": {"maxTokens": 4},
        }
        answer: list[Message] = list(stub("Chat", channel.unary_stream)(request))
        return sorted(database.get_services()), [message.WhichOneof("event") for message in answer]


async def test_a_client_made_from_reflection_alone_can_chat(router: TestRouter) -> None:
    async with router.replica():
        services, events = await asyncio.to_thread(
            call_by_reflection, router.addresses.grpc, lambda listed: str(listed.models[0].name)
        )
    assert services == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
        "wattline.v1.Cluster",
        "wattline.v1.Inference",
    ]
    assert events[-1] == "final"
    assert set(events[:-1]) == {"delta"}


async def test_a_client_made_from_reflection_alone_can_infer(router: TestRouter) -> None:
    async with router.replica():
        answer = await asyncio.to_thread(infer_by_reflection, router.addresses.grpc)
    assert answer.DESCRIPTOR.full_name == "inference.ModelInferResponse"
    assert [output.name for output in answer.outputs] == ["text_output"]


async def test_a_time_leads_to_its_trace_in_the_openmetrics_format(router: TestRouter) -> None:
    async with router.replica():
        answer = await collect(router.inference.Generate(make_request("hi", energy_wait_ms=1000)))
        _, text = await get(router, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    for name in ("time_to_first_token", "time_per_output_token", "queue", "request_duration"):
        lines = [line for line in text.splitlines() if line.startswith(f"wattline_{name}_seconds_bucket")]
        assert any(f'# {{trace_id="{answer.final.trace_id}"}}' in line for line in lines)


async def test_pickers_find_the_names_they_know_and_the_ledger_adds_up(router: TestRouter) -> None:
    totals = link.LedgerTotals(
        until_ns=1,
        source="counter",
        confidence_factor=1.05,
        meter_mj=1_111,
        prefill_mj=1_000,
        decode_mj=100,
        idle_mj=10,
        unattributed_mj=1,
        static_mj=250,
        host_meter_mj=500,
        host_requests_mj=400,
        tenants=[
            link.TenantEnergy(tenant="red", prefill_mj=700, decode_mj=0),
            link.TenantEnergy(tenant="blue", prefill_mj=300, decode_mj=90),
        ],
    )
    async with router.replica() as replica:
        await replica.report_ledger(totals)
        text = ""
        async with asyncio.timeout(60):
            while 'wattline_energy_meter_joules_total{model="tiny",source="counter"} 1.111' not in text:
                _, text = await get(router, "/metrics")
    for line in (
        'vllm:num_requests_running{model_name="tiny"} 0.0',
        'vllm:num_requests_waiting{model_name="tiny"} 0.0',
        'vllm:kv_cache_usage_perc{model_name="tiny"} 0.0',
        'vllm:kv_cache_usage_perc{model_name="absent"} 0.0',
        'wattline_kv_usage_ratio{model="tiny",replica="replica-0"} 0.0',
        'wattline_batch_sequences{model="tiny",replica="replica-0"} 0.0',
        'wattline_energy_meter_joules_total{model="tiny",source="counter"} 1.111',
        'wattline_energy_static_joules_total{model="tiny",source="counter"} 0.25',
        'wattline_host_energy_joules_total{ledger="request",model="tiny",source="shared"} 0.4',
        'wattline_host_energy_joules_total{ledger="rest",model="tiny",source="shared"} 0.1',
    ):
        assert line in text.splitlines()
    joules = [line for line in text.splitlines() if line.startswith("wattline_energy_joules_total{")]
    seen = [re.search(r'phase="(\w+)".*tenant="(\w+)"} (.*)', line) for line in joules]
    assert [found.groups() for found in seen if found] == [
        ("prefill", "red", "0.7"),
        ("prefill", "blue", "0.3"),
        ("decode", "red", "0.0"),
        ("decode", "blue", "0.09"),
        ("decode", "none", "0.01"),
        ("none", "none", "0.01"),
        ("none", "none", "0.001"),
    ]
    assert "wattline_power_watts{" not in text


async def test_metrics_count_requests_tokens_and_joules(router: TestRouter) -> None:
    async with router.replica():
        await collect(router.inference.Generate(make_request("hi", energy_wait_ms=1000)))
        with pytest.raises(grpc.aio.AioRpcError):
            await collect(router.inference.Generate(make_request(model="gpt-9")))
        status, text = await get(router, "/metrics")
    lines = text.splitlines()
    assert status == 200
    for line in (
        'wattline_requests_total{code="OK",model="tiny"} 1.0',
        'wattline_requests_total{code="NOT_FOUND",model="unknown"} 1.0',
        'wattline_tokens_total{kind="prompt",model="tiny"} 2.0',
        'wattline_tokens_total{kind="output",model="tiny"} 8.0',
        'wattline_request_energy_joules_total{model="tiny",phase="prefill",source="fake"} 1.0',
        'wattline_request_energy_joules_total{model="tiny",phase="decode",source="fake"} 2.0',
        'wattline_time_to_first_token_seconds_count{model="tiny"} 1.0',
        'wattline_time_per_output_token_seconds_count{model="tiny"} 1.0',
        'wattline_request_duration_seconds_count{model="tiny"} 1.0',
        'wattline_queue_seconds_count{model="tiny"} 1.0',
        'wattline_active_streams{model="tiny"} 0.0',
        'wattline_queued_requests{model="tiny"} 0.0',
        'wattline_replicas{model="tiny",state="ready"} 1.0',
        'wattline_kv_blocks_capacity{model="tiny",replica="replica-0"} 1000.0',
        'wattline_link_messages_total{direction="down",event="submit"} 1.0',
    ):
        assert line in lines
    assert "gpt-9" not in text


async def test_metrics_are_open_metrics_for_who_asks(router: TestRouter) -> None:
    _, text = await get(router, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


async def test_probes_tell_alive_from_ready(router: TestRouter) -> None:
    assert await get(router, "/healthz") == (200, "alive\n")
    status, body = await get(router, "/readyz")
    assert (status, json.loads(body)) == (503, {"ready_models": []})
    async with router.replica():
        status, body = await get(router, "/readyz")
    assert (status, json.loads(body)) == (200, {"ready_models": [MODEL]})


async def test_the_hosts_joules_are_beside_an_answers_total_and_absent_where_unknown(
    router: TestRouter,
) -> None:
    async with router.replica(host_mj=700):
        told = (
            await collect(router.inference.Generate(make_request("hi", energy_wait_ms=1000)))
        ).final.energy
    async with router.replica(epoch=2):
        bare = (
            await collect(router.inference.Generate(make_request("hi", energy_wait_ms=1000)))
        ).final.energy
    assert told.total_j == bare.total_j
    assert (to_energy(told).host_j, to_energy(told).host_source) == (0.7, "shared")
    assert (to_energy(bare).host_j, to_energy(bare).host_source) == (None, "")


async def trace_of_one_request(
    endpoint: str, *, energy: EnergyMode, closes_energy: bool = False, tells_trail: bool = True
) -> None:
    """Run one request with a caller's trace context; the router's stop exports all its spans."""
    config = make_config(telemetry={"otlp_endpoint": endpoint}, energy={"pue": 1.3})
    replica_fields = {"energy": energy, "host_mj": 700, "tells_trail": tells_trail}
    async with run_test_router(config) as router, router.replica(**replica_fields) as replica:
        await replica.report_ledger(link.LedgerTotals(source="fake", meter_mj=100))
        await replica.report_ledger(
            link.LedgerTotals(source="fake", meter_mj=12_100, decode_mj=10_000, idle_mj=2_000, until_ns=1)
        )
        metadata = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),)
        request = make_request(SECRET, energy_wait_ms=0)
        answer = await collect(router.inference.Generate(request, metadata=metadata))
        assert answer.final.trace_id == TRACE_ID
        submit = (await replica.wait_command("submit")).submit
        assert submit.traceparent.startswith(f"00-{TRACE_ID}-")
        if closes_energy:
            await replica.close_energy()


async def test_the_trace_has_the_callers_id_the_phases_and_the_final_joules(
    collector: tuple[Collector, str],
) -> None:
    servicer, endpoint = collector
    await trace_of_one_request(endpoint, energy=EnergyMode.LATE, closes_energy=True)
    assert {span.trace_id.hex() for span in servicer.spans} == {TRACE_ID}
    rpc = servicer.span("wattline.v1.Inference/Generate")
    assert (rpc.parent_span_id.hex(), rpc.kind) == (PARENT_ID, Span.SPAN_KIND_SERVER)
    assert attributes(rpc) == {
        "rpc.system.name": "grpc",
        "rpc.method": "wattline.v1.Inference/Generate",
        "rpc.response.status_code": "OK",
    }
    inference = servicer.span(f"text_completion {MODEL}")
    for name in ("admission", "tokenize", "route"):
        assert servicer.span(name).parent_span_id == rpc.span_id
    for name in ("queue", "prefill", "decode"):
        assert servicer.span(name).parent_span_id == inference.span_id
    prefill = servicer.span("prefill")
    assert prefill.end_time_unix_nano - prefill.start_time_unix_nano == 2_000_000
    values = attributes(inference)
    assert values["gen_ai.operation.name"] == "text_completion"
    assert values["gen_ai.provider.name"] == "wattline"
    assert values["gen_ai.request.model"] == values["gen_ai.response.model"] == MODEL
    assert (values["gen_ai.usage.input_tokens"], values["gen_ai.usage.output_tokens"]) == (len(SECRET), 8)
    assert values["gen_ai.response.finish_reasons"] == ["length"]
    assert (values["gen_ai.request.max_tokens"], values["gen_ai.request.temperature"]) == (8, 0.0)
    assert (values["wattline.energy.total_j"], values["wattline.energy.prefill_j"]) == (3.0, 1.0)
    assert (values["wattline.energy.decode_j"], values["wattline.energy.static_j"]) == (2.0, 0.3)
    assert (values["wattline.energy.source"], values["wattline.energy.final"]) == ("fake", True)
    # A fifth of what requests took was drawn while nothing ran; it is beside the bill, not in it.
    assert (values["wattline.energy.idle_share_j"], values["wattline.energy.pue"]) == (0.6, 1.3)
    assert (values["wattline.energy.host_j"], values["wattline.energy.host_source"]) == (0.7, "shared")
    assert values["wattline.energy.method"].startswith("step-ledger/")
    assert (values["wattline.energy.window_ms"], values["wattline.energy.confidence"]) == (30.0, 1.0)
    assert inference.end_time_unix_nano <= rpc.end_time_unix_nano
    assert not any(SECRET in str(span) for span in servicer.spans)


STEPS = ("wattline.step.first", "wattline.step.last", "wattline.step.count")


async def test_the_spans_name_the_engines_steps_and_the_longest_gap_between_tokens(
    collector: tuple[Collector, str],
) -> None:
    servicer, endpoint = collector
    await trace_of_one_request(endpoint, energy=EnergyMode.AT_ONCE)
    inference, decode = attributes(servicer.span(f"text_completion {MODEL}")), servicer.span("decode")
    assert (inference["wattline.replica.id"], inference["wattline.replica.epoch"]) == ("replica-0", 1)
    assert [inference[name] for name in STEPS] == [1, 8, 8]
    assert [attributes(servicer.span("prefill"))[name] for name in STEPS] == [1, 1, 1]
    assert [attributes(decode)[name] for name in STEPS] == [2, 8, 7]
    assert not attributes(servicer.span("queue")), "what waits is in no step"
    (gap,) = decode.events
    assert (gap.name, gap.time_unix_nano) == ("wattline.token_gap", decode.end_time_unix_nano)
    assert attributes(gap) == {"wattline.token_gap.duration_ms": 1.0, "wattline.token_gap.step": 8}


async def test_an_engine_that_tells_no_steps_has_its_phases_all_the_same(
    collector: tuple[Collector, str],
) -> None:
    servicer, endpoint = collector
    await trace_of_one_request(endpoint, energy=EnergyMode.AT_ONCE, tells_trail=False)
    assert servicer.span("prefill") and not servicer.span("decode").events
    assert not any(name in attributes(span) for span in servicer.spans for name in STEPS)


@pytest.mark.parametrize("is_on", [False, True])
async def test_a_prompt_is_on_a_span_only_where_that_is_switched_on(
    collector: tuple[Collector, str], caplog: pytest.LogCaptureFixture, is_on: bool
) -> None:
    servicer, endpoint = collector
    telemetry = {"otlp_endpoint": endpoint, "record_prompts": is_on}
    caplog.set_level("DEBUG")
    async with run_test_router(make_config(telemetry=telemetry)) as router:
        async with router.replica() as replica:
            await collect(router.inference.Generate(make_request(SECRET)))
            chat = pb.ChatRequest(model=MODEL, messages=[pb.Message(role=SECRET, content=SECRET)])
            await fail(router.inference.Chat(chat))
            await fail(router.inference.Generate(make_request(SECRET, stop=[SECRET * 9])))
            replica.running.clear()
            lost = router.inference.Generate(make_request(SECRET))
            await lost.initial_metadata()
            await replica.end(Fate.KILLED)
            await fail(lost)
        await fail(router.inference.Generate(make_request(SECRET)))
    assert any(SECRET in str(span) for span in servicer.spans) is is_on
    assert servicer.span(f"text_completion {MODEL}")
    ours = [record for record in caplog.records if record.name.startswith(("cluster", "replicas"))]
    assert ours and not any(SECRET in record.getMessage() for record in ours)


async def test_the_trace_tells_of_a_failover(collector: tuple[Collector, str]) -> None:
    servicer, endpoint = collector
    async with run_test_router(make_config(telemetry={"otlp_endpoint": endpoint})) as router:
        old = router.replica(replica_id="old")
        await old.attach()
        old.running.clear()
        call = router.inference.Generate(make_request(SECRET))
        await old.wait_command("submit")
        await old.step()
        async with router.replica(replica_id="new"):
            await old.leave()
            await collect(call)
    inference = servicer.span(f"text_completion {MODEL}")
    values = attributes(inference)
    assert (values["wattline.attempts"], values["wattline.resumed_at"]) == (2, [1])
    assert values["wattline.replica.id"] == "new"
    (event,) = inference.events
    assert event.name == "wattline.failover"
    assert attributes(event) == {
        "wattline.failover.reason": "failed",
        "wattline.failover.offset": 1,
        "wattline.failover.from_replica": "old",
        "wattline.failover.to_replica": "new",
    }
    assert servicer.span("queue").start_time_unix_nano >= event.time_unix_nano


async def test_a_trace_without_joules_says_so(collector: tuple[Collector, str]) -> None:
    servicer, endpoint = collector
    await trace_of_one_request(endpoint, energy=EnergyMode.NEVER)
    values = attributes(servicer.span(f"text_completion {MODEL}"))
    assert values["wattline.energy.final"] is False
    assert "wattline.energy.total_j" not in values


async def test_a_dead_collector_does_not_hold_up_serving_or_stopping() -> None:
    async with asyncio.timeout(60):
        await trace_of_one_request("127.0.0.1:1", energy=EnergyMode.AT_ONCE)
