"""The typed client against a real gRPC server with scripted answers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster.client import Ask, CallError, Client
from cluster.command_error import CommandError
from cluster.replies import Delta, Final, TokenLogprobs
from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_cluster_pb2_grpc as cluster_rpc
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as rpc
from protos import wattline_link_pb2 as link_pb


class ScriptedInference(rpc.InferenceServicer):
    """Repeats the last words it was given, one piece each, and remembers the request."""

    def __init__(self) -> None:
        self.asked: list[pb.ChatRequest | pb.GenerateRequest] = []

    def Chat(  # noqa: N802
        self, request: pb.ChatRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.asked.append(request)
        if request.model == "broken":
            context.abort(grpc.StatusCode.UNAVAILABLE, "the replica died under the stream")
        pieces = request.messages[-1].content.split()
        for index, piece in enumerate(pieces, start=1):
            reason = pb.FINISH_REASON_STOP if index == len(pieces) else pb.FINISH_REASON_UNSPECIFIED
            yield pb.GenerateResponse(delta=pb.Delta(text=piece, token_ids=[index], finish_reason=reason))
        energy = pb.Energy(total_j=3.0, source="counter", state=pb.ENERGY_STATE_FINAL)
        usage = pb.Usage(prompt_tokens=4, completion_tokens=len(pieces))
        yield pb.GenerateResponse(
            final=pb.Final(request_id="r1", usage=usage, energy=energy, trace_id="t1", resumed_at=[1])
        )

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.asked.append(request)
        top = [pb.TokenLogprob(token_id=9, logprob=-0.25)]
        for index in range(request.sampling.n):
            said = [pb.TokenLogprobs(logprob=-0.5, top=top)]
            delta = pb.Delta(text="x", token_ids=[7], index=index, logprobs=said)
            yield pb.GenerateResponse(delta=delta)
        yield pb.GenerateResponse(final=pb.Final(request_id="r2"))

    def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(
            models=[pb.Model(name="m", context_tokens=64, ready_replicas=1, chat=True)]
        )


class ScriptedCluster(cluster_rpc.ClusterServicer):
    def Status(  # noqa: N802
        self, request: cluster_pb.StatusRequest, context: grpc.ServicerContext
    ) -> cluster_pb.StatusResponse:
        hello = link_pb.Hello(tensor_parallel=2, ranks=[link_pb.RankProcess(rank=1, pid=77, device="cpu")])
        load = link_pb.LoadSnapshot(running=[2, 1], free_blocks=[5, 6], total_blocks=[8, 8])
        replica = cluster_pb.ReplicaStatus(
            replica_id="m#1", state=cluster_pb.REPLICA_STATE_DRAINING, hello=hello, load=load
        )
        return cluster_pb.StatusResponse(models=[cluster_pb.ModelStatus(name="m", replicas=[replica])])


@pytest.fixture
def servicer() -> ScriptedInference:
    return ScriptedInference()  # type: ignore[abstract]  # It answers what is asked here.


@pytest.fixture
def client(servicer: ScriptedInference) -> Iterator[Client]:
    server = grpc.server(ThreadPoolExecutor(2))
    rpc.add_InferenceServicer_to_server(servicer, server)
    cluster_rpc.add_ClusterServicer_to_server(ScriptedCluster(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client:
        yield client
    server.stop(None).wait()


def test_chat_gives_the_pieces_and_then_the_cost(client: Client) -> None:
    *pieces, final = client.chat("m", [("system", "x"), ("user", "one two")])
    assert pieces == [
        Delta(text="one", token_ids=(1,), finish_reason=None),
        Delta(text="two", token_ids=(2,), finish_reason="stop"),
    ]
    assert isinstance(final, Final)
    assert (final.request_id, final.trace_id, final.usage.completion_tokens) == ("r1", "t1", 2)
    assert final.energy.total_j == 3.0
    assert final.energy.is_final
    assert final.resumed_at == (1,)


def test_what_the_router_does_not_know_is_none_and_not_zero(client: Client) -> None:
    *_, final = client.chat("m", [("user", "one")])
    assert isinstance(final, Final)
    assert final.energy.prefill_j is None
    assert final.energy.joules_per_output_token is None


def test_only_what_is_asked_for_is_sent(client: Client, servicer: ScriptedInference) -> None:
    list(client.generate("m", [3, 4], Ask(temperature=0.0, stop=("end",))))
    (asked,) = servicer.asked
    assert isinstance(asked, pb.GenerateRequest)
    assert list(asked.tokens.ids) == [3, 4]
    assert asked.sampling.HasField("temperature")
    assert not asked.sampling.HasField("seed")
    assert not asked.limits.HasField("max_tokens")
    assert list(asked.limits.stop) == ["end"]


def test_the_whole_sampling_surface_goes_out_and_choices_with_logprobs_come_back(
    client: Client, servicer: ScriptedInference
) -> None:
    ask = Ask(
        top_p=0.5,
        top_k=4,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        logit_bias={3: -100.0},
        logprobs=1,
        num_choices=2,
        seed=2**64 - 1,
    )
    *deltas, _ = client.generate("m", "hi", ask)
    said = TokenLogprobs(logprob=-0.5, top=((9, -0.25),))
    assert deltas == [
        Delta(text="x", token_ids=(7,), finish_reason=None, logprobs=(said,), index=index) for index in (0, 1)
    ]
    assert servicer.asked[0].sampling == pb.Sampling(
        top_p=0.5,
        top_k=4,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        logit_bias={3: -100.0},
        logprobs=1,
        n=2,
        seed=2**64 - 1,
    )


def test_a_refusal_keeps_its_code_and_its_words(client: Client) -> None:
    with pytest.raises(CallError) as caught:
        list(client.chat("broken", [("user", "x")]))
    assert (caught.value.code, str(caught.value)) == ("UNAVAILABLE", "the replica died under the stream")


def test_nobody_listening_is_said_with_the_way_out() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(CallError) as caught:
        client.list_models()
    assert str(caught.value) == "no router at 127.0.0.1:1; start one with `wattline up -f wattline.yaml`"


def test_status_sums_the_lanes(client: Client) -> None:
    (model,) = client.status().models
    (replica,) = model.replicas
    assert (replica.state, replica.running, replica.free_blocks, replica.total_blocks) == (
        "draining",
        3,
        11,
        16,
    )
    assert [rank.pid for rank in replica.ranks] == [77]
    assert model.joules_per_output_token is None
    assert model.num_ready == 0


def test_what_is_no_text_is_refused_in_a_sentence_before_it_is_sent(client: Client) -> None:
    with pytest.raises(CommandError, match="not valid UTF-8"):
        list(client.chat("m", [("user", "\udcff")]))
    with pytest.raises(CommandError, match="not valid UTF-8"):
        list(client.generate("m", "\udcff"))


def test_power_of_zero_on_the_wire_is_unknown(client: Client) -> None:
    assert client.status().models[0].replicas[0].power_w is None
