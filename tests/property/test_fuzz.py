"""Whatever comes in over the wire: the process lives, nothing leaks, and every call has a proper status.

Real servers: a router with a null replica in processes of its own, an energy agent and a
ledger store. The long runs are in `make soak`.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep, time
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cluster.ledger.database import Database
from cluster.ledger.service import SERVICE, LedgerServicer
from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_energy_pb2 as energy_pb
from protos import wattline_inference_pb2 as pb
from protos import wattline_ledger_pb2 as ledger
from protos import wattline_link_pb2 as link
from protos import wattline_oip_pb2 as oip
from protos.wattline_ledger_pb2_grpc import add_LedgerStoreServicer_to_server
from replicas.config import EngineLimits, NullEngineConfig, ReplicaConfig
from replicas.energy.agent import EnergyAgent
from replicas.link.protocol import PROTOCOL_VERSION
from replicas.strict_messages import add_strictly
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor
from tests.fuzz.ledger import RECORD
from tests.fuzzing import JSON_VALUES, changed, changed_json, messages, mutated, spoilt
from tests.router_fixture import MODEL, VOCAB_SIZE, TestRouter, make_config, make_request, run_test_router

pytestmark = pytest.mark.processes

WAIT_S = 150.0
CALL_TIMEOUT_S = 60.0
IMPROPER = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS}
REPLICA = "one"
QUICK = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=4000)

GENERATE = make_request(max_tokens=4)
CHAT = pb.ChatRequest(
    model=MODEL, messages=[pb.Message(role="user", content="hello")], limits=pb.Limits(max_tokens=4)
)
TENSORS = oip.ModelInferRequest(
    model_name=MODEL,
    parameters={"max_tokens": oip.InferParameter(int64_param=4)},
    inputs=[
        oip.InferInputTensor(
            name="text_input",
            datatype="BYTES",
            shape=[1],
            contents=oip.InferTensorContents(bytes_contents=[b"hello"]),
        )
    ],
)
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": MODEL,
        "prompt": "hello",
        "max_tokens": 4,
        "logit_bias": {"7": 1},
        "stop": [],
    },
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "stream": True,
        "top_logprobs": None,
    },
}
"""Good HTTP requests."""
HELLO = link.FromReplica(
    epoch=7,
    hello=link.Hello(
        protocol=PROTOCOL_VERSION,
        replica_id="fuzz",
        model="absent",
        lanes=1,
        context_tokens=100,
        max_sequences=4,
        vocab_size=VOCAB_SIZE,
    ),
)
BASES: dict[str, tuple[Message, bool]] = {
    "/wattline.v1.Inference/Generate": (GENERATE, True),
    "/wattline.v1.Inference/Chat": (CHAT, True),
    "/wattline.v1.Inference/Tokenize": (pb.TokenizeRequest(model=MODEL, text="hello"), False),
    "/wattline.v1.Inference/Detokenize": (pb.DetokenizeRequest(model=MODEL, token_ids=[5, 6]), False),
    "/wattline.v1.Inference/ListModels": (pb.ListModelsRequest(), False),
    "/wattline.v1.Inference/GetEnergy": (pb.GetEnergyRequest(request_id="x"), False),
    "/wattline.v1.Cluster/Status": (cluster_pb.StatusRequest(last_requests=3), False),
    "/wattline.v1.Cluster/WatchSignals": (cluster_pb.WatchSignalsRequest(), True),
    "/wattline.v1.Cluster/DrainReplica": (cluster_pb.DrainReplicaRequest(replica_id="nobody"), False),
    "/grpc.health.v1.Health/Check": (health_pb2.HealthCheckRequest(service=MODEL), False),
    "/inference.GRPCInferenceService/ModelInfer": (TENSORS, False),
    "/inference.GRPCInferenceService/ModelMetadata": (oip.ModelMetadataRequest(name=MODEL), False),
    "/inference.GRPCInferenceService/ModelReady": (oip.ModelReadyRequest(name=MODEL), False),
}
"""Each method with a good request, and whether its answer is a stream."""


NO_MESSAGES = {"no UTF-8": b"\x0a\x02\xff\xfe", "no tag": b"\xff" * 9, "cut": b"\x0a\x7f"}


class Background:
    """An event loop in a thread of its own: what is fuzzed lives there, Hypothesis here."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()


class Target:
    """A router with one null replica, seen from outside."""

    def __init__(self, router: TestRouter) -> None:
        self.clients = grpc.insecure_channel(router.addresses.grpc)
        self.http = router.addresses.http
        self.links = grpc.insecure_channel(router.addresses.link)

    def call(self, method: str, content: bytes, *, is_stream: bool) -> grpc.StatusCode:
        """The status of one call; of a stream, one message is read and the rest is cancelled."""
        make: Callable[..., Any] = self.clients.unary_stream if is_stream else self.clients.unary_unary
        ask = make(method, request_serializer=bytes, response_deserializer=bytes)
        if not is_stream:
            try:
                ask(content, timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as error:
                return _code(error)
            return grpc.StatusCode.OK
        stream = ask(content, timeout=CALL_TIMEOUT_S)
        try:
            for _ in stream:
                stream.cancel()
                break
        except grpc.RpcError as error:
            return _code(error)
        return grpc.StatusCode.OK

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        """Status and text of an HTTP request."""
        connection = HTTPConnection(self.http, timeout=CALL_TIMEOUT_S)
        try:
            connection.request("POST", path, body)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def stream_tensors(self, contents: list[bytes]) -> grpc.StatusCode:
        """The status of a stream of tensors that are all answered."""
        ask = self.clients.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=bytes,
            response_deserializer=oip.ModelStreamInferResponse.FromString,
        )
        try:
            for response in ask(iter(contents), timeout=CALL_TIMEOUT_S):
                assert "internal error" not in response.error_message
        except grpc.RpcError as error:
            return _code(error)
        return grpc.StatusCode.OK

    def attach(self, contents: list[bytes]) -> grpc.StatusCode:
        """The status of a link that says this and then ends."""
        ask = self.links.stream_stream(
            "/wattline.v1.ReplicaLink/Attach", request_serializer=bytes, response_deserializer=bytes
        )
        try:
            for _ in ask(iter(contents), timeout=CALL_TIMEOUT_S):
                pass
        except grpc.RpcError as error:
            return _code(error)
        return grpc.StatusCode.OK

    def status(self) -> cluster_pb.StatusResponse:
        ask = self.clients.unary_unary(
            "/wattline.v1.Cluster/Status",
            request_serializer=cluster_pb.StatusRequest.SerializeToString,
            response_deserializer=cluster_pb.StatusResponse.FromString,
        )
        answer: cluster_pb.StatusResponse = ask(cluster_pb.StatusRequest(), timeout=CALL_TIMEOUT_S)
        return answer

    def assert_whole(self) -> None:
        """Soon nothing is under way, every block is free, and only the real replica is attached."""
        give_up_s = monotonic() + WAIT_S
        while not (found := self._is_whole()):
            assert monotonic() < give_up_s, self.status()
            sleep(0.02)
        assert found

    def _is_whole(self) -> bool:
        models = self.status().models
        replicas = [replica for model in models for replica in model.replicas]
        return [replica.hello.replica_id for replica in replicas] == [REPLICA] and all(
            not model.active_requests
            and not replica.requests_in_flight
            and not sum(replica.load.running)
            and list(replica.load.free_blocks) == list(replica.load.total_blocks)
            for model, replica in zip(models, replicas, strict=False)
        )


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    assert isinstance(error, grpc.Call)
    code: grpc.StatusCode = error.code()
    return code


@pytest.fixture(scope="module")
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.close()


@pytest.fixture(scope="module")
def target(background: Background) -> Iterator[Target]:
    with TemporaryDirectory(prefix="wl-", dir="/tmp") as name:
        stack = AsyncExitStack()

        async def start() -> TestRouter:
            router = await stack.enter_async_context(run_test_router(make_config()))
            config = ReplicaConfig(
                model=MODEL,
                source="null",
                replica_id=REPLICA,
                routers=(router.addresses.link,),
                limits=EngineLimits(max_sequences=16, max_waiting=32, num_blocks=256),
                null=NullEngineConfig(step_ms=1.0, vocab_size=VOCAB_SIZE, context_tokens=256),
                runtime_dir=name,
                shared_dir=name,
                ready_timeout_s=WAIT_S,
                stall_floor_s=WAIT_S,
            )
            ranks = SubprocessRankGroup(runtime_dir=Path(name))
            supervisor = Supervisor(config, ranks, lambda _: None, first_link_timeout_s=WAIT_S)
            stack.push_async_callback(supervisor.stop)
            await supervisor.start()
            return router

        try:
            yield Target(background.run(start()))
        finally:
            background.run(stack.aclose())


def any_bytes(base: Message) -> st.SearchStrategy[bytes]:
    kind = type(base)
    whole = st.one_of(changed(base), messages(kind))
    return st.one_of(
        whole.map(lambda message: message.SerializeToString()), mutated(whole), st.binary(max_size=64)
    )


def link_streams() -> st.SearchStrategy[list[bytes]]:
    """Mostly a good Hello, and then whatever a replica could say, some of it spoilt."""
    said = messages(link.FromReplica)
    later = st.one_of(said.map(_of_this_life), mutated(said))
    first = st.one_of(st.just(HELLO.SerializeToString()), any_bytes(HELLO))
    return st.builds(lambda hello, rest: [hello, *rest], first, st.lists(later, max_size=6))


def _of_this_life(message: link.FromReplica) -> bytes:
    message.epoch = HELLO.epoch
    return message.SerializeToString()


calls = st.sampled_from(sorted(BASES)).flatmap(
    lambda method: st.tuples(st.just(method), any_bytes(BASES[method][0]))
)


def fuzz_calls(target: Target, call: tuple[str, bytes]) -> None:
    method, content = call
    assert target.call(method, content, is_stream=BASES[method][1]) not in IMPROPER


bodies = st.sampled_from(sorted(BODIES)).flatmap(
    lambda path: st.tuples(
        st.just(path),
        st.one_of(
            changed_json(BODIES[path]),
            spoilt(changed_json(BODIES[path])),
            JSON_VALUES.map(lambda value: json.dumps(value).encode()),
        ),
    )
)


def fuzz_bodies(target: Target, body: tuple[str, bytes]) -> None:
    """A proper answer, or an error with words; never one that says it was our mistake."""
    status, text = target.post(*body)
    assert status != 500, text
    assert status == 200 or json.loads(text)["error"]["message"]


def fuzz_tensor_stream(target: Target, contents: list[bytes]) -> None:
    assert target.stream_tensors(contents) not in IMPROPER


def fuzz_links(target: Target, contents: list[bytes]) -> None:
    assert target.attach(contents) not in IMPROPER


def test_no_call_harms_the_router(target: Target) -> None:
    settings(QUICK, max_examples=300)(given(calls)(lambda call: fuzz_calls(target, call)))()
    target.assert_whole()


def test_no_body_harms_the_router(target: Target) -> None:
    settings(QUICK, max_examples=100)(given(bodies)(lambda body: fuzz_bodies(target, body)))()
    target.assert_whole()


def test_no_tensor_stream_harms_the_router(target: Target) -> None:
    """Requests side by side in one call: an error of one is a message, and bytes that are none end it."""
    stream = st.lists(any_bytes(TENSORS), max_size=4)
    QUICK(given(stream)(lambda contents: fuzz_tensor_stream(target, contents)))()
    target.assert_whole()


def test_no_link_harms_the_router(target: Target) -> None:
    QUICK(given(link_streams())(lambda contents: fuzz_links(target, contents)))()
    target.assert_whole()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_no_call_harms_the_router_for_long(target: Target) -> None:
    LONG(given(calls)(lambda call: fuzz_calls(target, call)))()
    target.assert_whole()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_no_link_harms_the_router_for_long(target: Target) -> None:
    LONG(given(link_streams())(lambda contents: fuzz_links(target, contents)))()
    target.assert_whole()


@pytest.mark.parametrize("method", sorted(BASES))
@pytest.mark.parametrize("content", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_bytes_that_are_no_message_are_an_invalid_argument(
    target: Target, method: str, content: bytes
) -> None:
    base, is_stream = BASES[method]
    try:
        type(base).FromString(content)
    except Exception:
        assert target.call(method, content, is_stream=is_stream) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_link_that_says_no_message_is_an_invalid_argument(target: Target) -> None:
    assert target.attach([b"\xff" * 9]) is grpc.StatusCode.INVALID_ARGUMENT
    for _ in range(100):  # Some meet the router's first word to them, and each must hear how it ended.
        assert target.attach([HELLO.SerializeToString(), b"\xff" * 9]) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lanes": 2**32 - 1}, "lanes are too many; 1024 is the limit"),
        ({"replica_id": "x" * 300}, "replica_id must be printable and have 256 characters at most"),
        ({"replica_id": "a\nreplica_attached id=b"}, "replica_id must be printable"),
    ],
)
def test_a_hello_has_bounds(target: Target, change: dict[str, Any], reason: str) -> None:
    hello = link.FromReplica()
    hello.CopyFrom(HELLO)
    for name, value in change.items():
        setattr(hello.hello, name, value)
    call = target.links.stream_stream(
        "/wattline.v1.ReplicaLink/Attach", request_serializer=bytes, response_deserializer=bytes
    )(iter([hello.SerializeToString()]), timeout=CALL_TIMEOUT_S)
    assert call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason in call.details()


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_is_bounded_also_when_it_is_unpacked(target: Target, compression: grpc.Compression) -> None:
    ask = target.clients.unary_unary(
        "/wattline.v1.Inference/Tokenize", request_serializer=bytes, response_deserializer=bytes
    )
    content = pb.TokenizeRequest(model=MODEL, text="a" * (64 * 2**20)).SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        ask(content, timeout=CALL_TIMEOUT_S, compression=compression)
    assert _code(caught.value) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_metadata_is_bounded(target: Target) -> None:
    ask = target.clients.unary_unary(
        "/wattline.v1.Inference/ListModels", request_serializer=bytes, response_deserializer=bytes
    )
    with pytest.raises(grpc.RpcError) as caught:
        ask(b"", timeout=CALL_TIMEOUT_S, metadata=(("x-much", "a" * 40_000),))
    assert _code(caught.value) is grpc.StatusCode.RESOURCE_EXHAUSTED


WATCH = energy_pb.WatchEnergyRequest(group="g", meter="fake")


def test_no_call_harms_the_energy_agent(background: Background, tmp_path: Path) -> None:
    agent: EnergyAgent = background.run(_make_agent(tmp_path))
    channel = grpc.insecure_channel(f"unix:{tmp_path}/agent.sock")
    watch = channel.unary_stream(
        "/wattline.v1.EnergyAgent/Watch", request_serializer=bytes, response_deserializer=bytes
    )

    def fuzz(content: bytes) -> None:
        stream = watch(content, timeout=CALL_TIMEOUT_S)
        try:
            for _ in stream:
                stream.cancel()
                break
        except grpc.RpcError as error:
            assert _code(error) not in IMPROPER

    try:
        QUICK(given(any_bytes(WATCH))(fuzz))()
        describe = channel.unary_unary(
            "/wattline.v1.EnergyAgent/DescribeMeters", request_serializer=bytes, response_deserializer=bytes
        )
        assert describe(b"", timeout=CALL_TIMEOUT_S)
    finally:
        channel.close()
        background.run(agent.stop())


async def _make_agent(folder: Path) -> EnergyAgent:
    agent = EnergyAgent(poll_s=0.01)
    await agent.start(f"unix:{folder}/agent.sock")
    return agent


LEDGER_CALLS: dict[str, tuple[Message, bool]] = {
    "Record": (RECORD, False),
    "Summarize": (ledger.SummarizeRequest(since_s=1.0, until_s=2.0), False),
    "ListRequests": (ledger.ListRequestsRequest(since_s=1.0, until_s=2.0), True),
    "LeaseEnergy": (ledger.LeaseEnergyRequest(tenant="a", want_mj=7, budget_mj_per_day=9), False),
    "GiveBackEnergy": (ledger.GiveBackEnergyRequest(tenant="a", unspent_mj=7, day=3), False),
}


def test_no_call_harms_the_ledger_store(background: Background, tmp_path: Path) -> None:
    """Whatever was taken before, everything can still be summed up."""
    stack = AsyncExitStack()
    channel = grpc.insecure_channel(f"unix:{tmp_path}/ledger.sock")

    def call(method: str, content: bytes, *, is_stream: bool) -> grpc.StatusCode:
        make: Callable[..., Any] = channel.unary_stream if is_stream else channel.unary_unary
        ask = make(f"/{SERVICE}/{method}", request_serializer=bytes, response_deserializer=bytes)
        try:
            answer = ask(content, timeout=CALL_TIMEOUT_S)
            list(answer) if is_stream else answer
        except grpc.RpcError as error:
            return _code(error)
        return grpc.StatusCode.OK

    def fuzz(told: tuple[str, bytes]) -> None:
        method, content = told
        assert call(method, content, is_stream=LEDGER_CALLS[method][1]) not in IMPROPER

    told = st.sampled_from(sorted(LEDGER_CALLS)).flatmap(
        lambda method: st.tuples(st.just(method), any_bytes(LEDGER_CALLS[method][0]))
    )
    try:
        background.run(_start_ledger(stack, tmp_path))
        settings(QUICK, max_examples=150)(given(told)(fuzz))()
        assert call("Record", b"\xff" * 9, is_stream=False) is grpc.StatusCode.INVALID_ARGUMENT
        assert call("Summarize", b"", is_stream=False) is grpc.StatusCode.OK
        assert call("ListRequests", b"", is_stream=True) is grpc.StatusCode.OK
    finally:
        channel.close()
        background.run(stack.aclose())


async def _start_ledger(stack: AsyncExitStack, folder: Path) -> None:
    servicer = LedgerServicer(Database(folder / "ledger.db"), wall_s=time)
    stack.callback(servicer.close)
    server = grpc.aio.server()
    add_strictly(add_LedgerStoreServicer_to_server, servicer, server)
    server.add_insecure_port(f"unix:{folder}/ledger.sock")
    await server.start()
    stack.push_async_callback(server.stop, None)
