"""Open Inference Protocol v2, spoken by the unmodified Triton client in the same process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from threading import current_thread
from typing import Any, cast

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2
from tritonclient.grpc.aio import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from cluster.router.choices import choice_seed
from cluster.text.null_tokenizer import NullTokenizer
from protos import wattline_link_pb2 as link
from tests.fake_replica import MJ_PER_TOKEN, hash_token
from tests.router_fixture import (
    MODEL,
    VOCAB_SIZE,
    TestRouter,
    decode,
    make_config,
    run_test_router,
    script,
    spell,
)

WAIT_S = 150.0


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    async with run_test_router() as running:
        yield running


@pytest.fixture
async def client(router: TestRouter) -> AsyncIterator[InferenceServerClient]:
    async with InferenceServerClient(router.addresses.grpc) as client:
        yield client


def make_input(name: str, value: Any, datatype: str) -> InferInput:
    kind = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32}[datatype]
    tensor = InferInput(name, [1], datatype)
    tensor.set_data_from_numpy(np.array([value], dtype=kind))
    return tensor


def make_inputs(
    text: str = "hello", sampling: dict[str, Any] | None = None, **flags: bool
) -> list[InferInput]:
    inputs = [make_input("text_input", text.encode(), "BYTES")]
    options = {"temperature": "0", "max_tokens": "4", **(sampling or {})}
    inputs.append(make_input("sampling_parameters", json.dumps(options).encode(), "BYTES"))
    return inputs + [make_input(name, value, "BOOL") for name, value in flags.items()]


def texts(result: InferResult, name: str = "text_output") -> list[str]:
    return [element.decode() for element in result.as_numpy(name)]


def expected(text: str = "hello", count: int = 4) -> str:
    return decode([hash_token(spell(text), pos, vocab_size=VOCAB_SIZE) for pos in range(count)])


async def stream(
    client: InferenceServerClient, requests: Sequence[dict[str, Any]]
) -> list[tuple[InferResult, InferenceServerException]]:
    async def asked() -> AsyncIterator[dict[str, Any]]:
        for request in requests:
            yield {"model_name": MODEL, **request}

    return [answer async for answer in client.stream_infer(asked())]


async def test_server_and_models_describe_themselves(
    router: TestRouter, client: InferenceServerClient
) -> None:
    assert await client.is_server_live()
    assert not await client.is_server_ready()
    async with router.replica():
        assert await client.is_server_ready()
        assert await client.is_model_ready(MODEL) and not await client.is_model_ready("absent")
        assert not await client.is_model_ready("other") and not await client.is_model_ready(MODEL, "2")
        metadata = await client.get_model_metadata(MODEL)
        config = (await client.get_model_config(MODEL)).config
        router.router._streams.is_stopping = True
        assert not await client.is_server_ready() and not await client.is_model_ready(MODEL)
    assert (await client.get_server_metadata()).name == "wattline"
    assert [tensor.name for tensor in metadata.inputs][:3] == ["text_input", "stream", "sampling_parameters"]
    assert list(metadata.outputs[0].shape) == [-1]
    assert config.model_transaction_policy.decoupled and config.max_batch_size == 0
    assert [tensor.optional for tensor in config.input] == [False] + [True] * 8
    with pytest.raises(InferenceServerException, match="name: got 'other'; allowed: tiny, absent; name one"):
        await client.get_model_metadata("other")
    with pytest.raises(InferenceServerException, match="version: got '2'; allowed: 1; name one"):
        await client.get_model_config(MODEL, "2")


async def test_a_whole_answer_has_its_input_before_it_and_joules_behind(
    router: TestRouter, client: InferenceServerClient
) -> None:
    async with router.replica():
        whole = await client.infer(MODEL, make_inputs(sampling={"energy_wait_ms": 1000}), request_id="seven")
        bare = await client.infer(MODEL, make_inputs(exclude_input_in_output=True))
    assert texts(whole) == ["hello" + expected()]
    assert texts(bare) == [expected()]
    response = whole.get_response()
    assert (response.id, response.model_version) == ("seven", "1")
    said = response.parameters
    joules = (1000 + 4 * MJ_PER_TOKEN) / 1e3
    assert said["triton_final_response"].bool_param
    assert said["wattline_energy_joules"].double_param == joules
    assert said["wattline_energy_joules_per_output_token"].double_param == joules / 4
    assert said["wattline_energy_state"].string_param == "final"
    assert len(said["wattline_trace_id"].string_param) == 32


async def test_a_stream_gives_pieces_and_a_final_response(
    router: TestRouter, client: InferenceServerClient
) -> None:
    request = {"inputs": make_inputs(stream=True, return_finish_reason=True), "request_id": "r"}
    async with router.replica():
        answers = await stream(client, [request])
    assert all(error is None for _, error in answers)
    results = [result for result, _ in answers]
    assert "".join(texts(result)[0] for result in results) == expected()
    finals = [result.get_response().parameters["triton_final_response"].bool_param for result in results]
    assert finals == [False] * (len(results) - 1) + [True]
    # The last piece says how it ended, and the final response again; a busy router may join all pieces.
    reasons = [reason for result in results for reason in texts(result, "finish_reason")]
    assert reasons == ["None"] * (len(results) - 2) + ["length", "length"]
    assert results[-1].get_response().parameters["wattline_energy_joules"].double_param > 0


def of_seed(submit: link.Submit, pos: int) -> int:
    return hash_token([submit.sampling.seed % 2**32], pos, vocab_size=VOCAB_SIZE)


async def test_choices_are_elements_of_one_tensor(router: TestRouter, client: InferenceServerClient) -> None:
    inputs = make_inputs(sampling={"n": 2, "seed": 5, "temperature": 1}, exclude_input_in_output=True)
    async with router.replica(tokens=of_seed):
        whole = await client.infer(MODEL, inputs)
        pieces = await stream(client, [{"inputs": [*inputs[:-1], make_input("stream", True, "BOOL")]}])
    seeds = [choice_seed(5, index) % 2**32 for index in (0, 1)]
    both = [decode([hash_token([seed], pos, vocab_size=VOCAB_SIZE) for pos in range(4)]) for seed in seeds]
    assert texts(whole) == both
    assert ["".join(texts(result)[index] for result, _ in pieces) for index in (0, 1)] == both


async def test_everything_that_can_be_returned_is(router: TestRouter, client: InferenceServerClient) -> None:
    inputs = make_inputs(
        "x",
        {"logprobs": 2, "max_tokens": 3},
        return_cumulative_logprob=True,
        return_logprobs=True,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
    )
    async with router.replica(tokens=script(*spell("abc"))):
        result = await client.infer(MODEL, inputs)
        some = await client.infer(MODEL, inputs, outputs=[InferRequestedOutput("num_output_tokens")])
    assert result.as_numpy("cumulative_logprob").tolist() == [-3.0]
    assert result.as_numpy("num_input_tokens").tolist() == [1]
    assert result.as_numpy("num_output_tokens").tolist() == [3]
    said = json.loads(texts(result, "logprobs")[0])
    first = str(spell("a")[0])
    assert said[1]["1"] == {"logprob": -2.0, "rank": 2, "decoded_token": ""}
    assert said[0][first] == {"logprob": 0.0, "rank": None, "decoded_token": "a"}
    assert [output.name for output in some.get_response().outputs] == ["num_output_tokens"]


async def test_many_logprobs_are_written_beside_the_event_loop(
    router: TestRouter, client: InferenceServerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    decode_here = NullTokenizer.decode

    def noting(tokenizer: NullTokenizer, ids: Sequence[int]) -> str:
        threads.add(current_thread().name.partition("_")[0])
        return decode_here(tokenizer, ids)

    monkeypatch.setattr(NullTokenizer, "decode", noting)
    sampling = {"max_tokens": 40, "logprobs": 2}
    async with router.replica():
        result = await client.infer(MODEL, make_inputs(sampling=sampling, return_logprobs=True))
    assert len(json.loads(texts(result, "logprobs")[0])) == 40
    assert "tokenize" in threads


async def test_an_error_in_a_stream_ends_its_request_alone(
    router: TestRouter, client: InferenceServerClient
) -> None:
    requests = [
        {"inputs": make_inputs(sampling={"temperature": 9}), "request_id": "bad"},
        {"inputs": make_inputs(exclude_input_in_output=True), "request_id": "good"},
    ]
    async with router.replica():
        answers = await stream(client, requests)
    errors = [error for _, error in answers if error is not None]
    results = [result for result, error in answers if error is None]
    assert [error.message() for error in errors] == [
        "temperature: got 9.0; allowed: 0 to 2.0; use 0 for greedy"
    ]
    assert [(result.get_response().id, texts(result)) for result in results] == [("good", [expected()])]


BAD: list[tuple[str, list[InferInput]]] = [
    ("text_input: got nothing", make_inputs()[1:]),
    ("text_input: got an empty prompt", make_inputs("")),
    ("inputs: got 'image'", [*make_inputs(), make_input("image", b"x", "BYTES")]),
    ("inputs: got 'text_input' twice", [*make_inputs(), make_inputs()[0]]),
    ("stream: got INT32", [*make_inputs(), make_input("stream", 1, "INT32")]),
    ("exclude_input_in_output: got false", make_inputs(stream=True, exclude_input_in_output=False)),
    (
        "sampling_parameters.body: got no valid JSON",
        [make_inputs()[0], make_input("sampling_parameters", b"{", "BYTES")],
    ),
    ("sampling_parameters.lora_name: got a value", make_inputs(sampling={"lora_name": "x"})),
    ("sampling_parameters.max_tokens: got another type", make_inputs(sampling={"max_tokens": "many"})),
    ("max_tokens: got 0", make_inputs(sampling={"max_tokens": 0})),
]


@pytest.mark.parametrize(("words", "inputs"), BAD, ids=[words for words, _ in BAD])
async def test_bad_requests_are_refused_by_name(
    router: TestRouter, client: InferenceServerClient, words: str, inputs: list[InferInput]
) -> None:
    async with router.replica():
        with pytest.raises(InferenceServerException) as caught:
            await client.infer(MODEL, inputs)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert (caught.value.message() or "").startswith(words)


async def test_several_elements_and_unknown_outputs_are_refused(
    router: TestRouter, client: InferenceServerClient
) -> None:
    two = InferInput("text_input", [2], "BYTES")
    two.set_data_from_numpy(np.array([b"a", b"b"], dtype=np.object_))
    async with router.replica():
        with pytest.raises(InferenceServerException, match="one prompt a request"):
            await client.infer(MODEL, [two])
        with pytest.raises(InferenceServerException, match="outputs: got 'logprobs'"):
            await client.infer(MODEL, make_inputs(), outputs=[InferRequestedOutput("logprobs")])


async def test_parameters_of_the_request_do_as_well_and_time_limits_hold(
    router: TestRouter, client: InferenceServerClient
) -> None:
    inputs = make_inputs(exclude_input_in_output=True)
    del inputs[1]
    async with router.replica() as replica:
        result = await client.infer(MODEL, inputs, parameters={"max_tokens": 2, "temperature": 0.0})
        assert texts(result) == [expected(count=2)]
        replica.running.clear()
        asking = asyncio.create_task(client.infer(MODEL, inputs, timeout=60_000_000))
        submit = (await replica.wait_command("submit", count=2)).submit
        assert 0 < submit.deadline_ms <= 60_000
        replica.running.set()
        await asking
        with pytest.raises(InferenceServerException, match="none beside sampling_parameters"):
            await client.infer(MODEL, make_inputs(), parameters={"seed": 3})


async def test_contents_in_the_message_are_read_too(router: TestRouter) -> None:
    """What KServe's own clients send: no raw bytes."""
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    tensor.contents.bytes_contents.append(b"hello")
    flag = request.inputs.add(name="exclude_input_in_output", datatype="BOOL", shape=[1])
    flag.contents.bool_contents.append(True)
    infer = router.channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )
    async with router.replica():
        response = await infer(request)
    assert InferResult(response).as_numpy("text_output").tolist() == [expected(count=16).encode()]


async def test_a_caller_that_leaves_a_stream_cancels_all_of_it(
    router: TestRouter, client: InferenceServerClient
) -> None:
    async with router.replica() as replica, asyncio.timeout(WAIT_S):
        replica.running.clear()
        asking = asyncio.create_task(stream(client, [{"inputs": make_inputs(stream=True)}] * 3))
        await replica.wait_command("submit", count=3)
        asking.cancel()
        await replica.wait_command("cancel", count=3)


class GoneCaller:
    """The context of a call whose caller is gone: gRPC may say it of a write before it does of the call."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    def cancelled(self) -> bool:
        return False

    done = cancelled

    async def write(self, _: object) -> None:
        raise grpc.aio.InternalError("the batch failed")


async def test_a_write_to_a_caller_who_is_gone_is_no_fault_of_ours(
    router: TestRouter, caplog: pytest.LogCaptureFixture
) -> None:
    async def requests() -> AsyncIterator[service_pb2.ModelInferRequest]:
        for text in (b"answered", b""):
            request = service_pb2.ModelInferRequest(model_name=MODEL)
            request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
            request.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
            yield request

    async with router.replica():
        await router.router._oip.ModelStreamInfer(requests(), cast(Any, GoneCaller()))
    assert [record.message for record in caplog.records if record.name == "cluster.router.rpc"] == []


async def test_it_can_be_switched_off() -> None:
    config = make_config(router={"protocols": {"oip": False}})
    async with run_test_router(config) as router, InferenceServerClient(router.addresses.grpc) as client:
        with pytest.raises(InferenceServerException, match="Method not found"):
            await client.is_server_live()
