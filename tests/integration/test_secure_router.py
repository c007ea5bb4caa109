"""A router that asks who calls: keys, certificates, tenants and their models, on gRPC, HTTP and the link."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import numpy as np
import pytest
from tritonclient.grpc.aio import InferenceServerClient, InferInput

from cluster.access import Access
from cluster.client import CallError, Client
from cluster.security import watched_files
from cluster.security.api_keys import make_key
from cluster.security.cache_salt import cache_salt
from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as inference_grpc
from replicas.config import LinkCredentials
from tests.certificates import Authority
from tests.router_fixture import MODEL, TestRouter, collect, fail, make_config, make_request, run_test_router

OTHER_MODEL = "absent"


class Keys:
    """A file of keys, and the keys that are in it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys"
        self.lines: list[str] = []
        self.path.write_text("")

    def add(self, tenant: str, **fields: Any) -> tuple[tuple[str, str], ...]:
        """Metadata with a new key."""
        text, key = make_key(tenant, **fields)
        self.lines.append(key.line)
        self.path.write_text("\n".join(self.lines))
        return (("authorization", f"Bearer {text}"),)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "tls")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at whenever they matter, instead of once a second."""
    monkeypatch.setattr(watched_files, "LOOK_PERIOD_S", 0.0)


@asynccontextmanager
async def asking_router(keys: Keys, **auth: Any) -> AsyncIterator[TestRouter]:
    config = make_config(router={"auth": {"keys_file": str(keys.path), **auth}})
    async with run_test_router(config) as router, router.replica():
        yield router


async def get(url: str, context: ssl.SSLContext | None = None, **headers: str) -> tuple[int, str]:
    def fetch() -> tuple[int, str]:
        try:
            with urlopen(Request(url, headers=headers), timeout=60, context=context) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


async def test_a_call_without_a_good_key_is_nobody_s(keys: Keys) -> None:
    expired = keys.add("acme", expires_on=date(2020, 1, 1))
    good = keys.add("acme")
    async with asking_router(keys) as router:
        ask = router.inference.Generate
        refused = [
            await fail(ask(make_request())),
            await fail(ask(make_request(), metadata=expired)),
            await fail(ask(make_request(), metadata=(("authorization", good[0][1][:-1]),))),
            await fail(router.inference.ListModels(pb.ListModelsRequest())),
            await fail(router.inference.GetEnergy(pb.GetEnergyRequest(request_id="x"))),
        ]
        assert {error.code() for error in refused} == {grpc.StatusCode.UNAUTHENTICATED}
        assert "send it as `authorization: Bearer KEY`" in (refused[0].details() or "")
        assert "is not known here, or its time is over" in (refused[1].details() or "")
        assert len((await collect(ask(make_request(), metadata=good))).token_ids) == 8
        plain = (("x-api-key", good[0][1].removeprefix("Bearer ")),)
        assert len((await collect(ask(make_request(), metadata=plain))).token_ids) == 8


async def test_a_key_that_is_taken_out_stops_and_streams_under_way_go_on(keys: Keys, at_once: None) -> None:
    key = keys.add("acme")
    async with asking_router(keys) as router:
        call = router.inference.Generate(make_request(max_tokens=200), metadata=key)
        await call.initial_metadata()
        keys.path.write_text("# nobody\n")
        refused = await fail(router.inference.ListModels(pb.ListModelsRequest(), metadata=key))
        assert refused.code() is grpc.StatusCode.UNAUTHENTICATED
        assert len((await collect(call)).token_ids) == 200


async def test_a_key_that_is_taken_out_begins_nothing_more_on_an_open_stream(
    keys: Keys, at_once: None
) -> None:
    ((name, value),) = keys.add("acme")
    text = InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"hello"], dtype=np.object_))
    answered = asyncio.Event()

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": MODEL, "inputs": [text]}
        await answered.wait()
        keys.path.write_text("# nobody\n")
        yield {"model_name": MODEL, "inputs": [text]}

    async with asking_router(keys) as router, InferenceServerClient(router.addresses.grpc) as client:
        errors = []
        async for _, error in client.stream_infer(requests(), headers={name: value}):
            errors.append(error and str(error))
            answered.set()
    assert errors == [None, "the API key is not known here, or its time is over; ask for a new one"]


async def test_a_tenant_uses_and_sees_its_models_alone(keys: Keys) -> None:
    acme, other = keys.add("acme"), keys.add("other")
    async with asking_router(keys, models={"acme": [OTHER_MODEL]}) as router:
        listed = await router.inference.ListModels(pb.ListModelsRequest(), metadata=acme)
        assert [model.name for model in listed.models] == [OTHER_MODEL]
        refused = await fail(router.inference.Generate(make_request(), metadata=acme))
        assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
        assert refused.details() == "tenant 'acme' may not use this model; see ListModels"
        unknown = await fail(router.inference.Generate(make_request(model="nope"), metadata=acme))
        assert MODEL not in (unknown.details() or "")
        assert len((await collect(router.inference.Generate(make_request(), metadata=other))).token_ids) == 8


async def test_only_operators_see_and_steer_the_whole(keys: Keys) -> None:
    acme, operator = keys.add("acme"), keys.add("ops")
    async with asking_router(keys, operators=["ops"]) as router:
        for refused in (
            await fail(router.cluster.Status(cluster_pb.StatusRequest(), metadata=acme)),
            await fail(router.cluster.Explain(cluster_pb.ExplainRequest(id="0"), metadata=acme)),
            await fail(router.cluster.WatchSignals(cluster_pb.WatchSignalsRequest(), metadata=acme)),
            await fail(
                router.cluster.DrainReplica(
                    cluster_pb.DrainReplicaRequest(replica_id="replica-0"), metadata=acme
                )
            ),
        ):
            assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
        assert (await router.cluster.Status(cluster_pb.StatusRequest(), metadata=operator)).models
        pages = f"http://{router.addresses.http}"
        bearer = operator[0][1]
        basic = base64.b64encode(f"me:{bearer.removeprefix('Bearer ')}".encode()).decode()
        statuses = [
            (await get(f"{pages}/healthz"))[0],
            (await get(f"{pages}/readyz"))[0],
            (await get(f"{pages}/metrics"))[0],
            (await get(f"{pages}/dash", Authorization="Basic bm9ib2R5"))[0],
            (await get(f"{pages}/dash", Authorization=acme[0][1]))[0],
            (await get(f"{pages}/metrics", Authorization=bearer))[0],
            (await get(f"{pages}/dash", Authorization=f"Basic {basic}"))[0],
        ]
        assert statuses == [200, 200, 401, 401, 403, 200, 200]


async def test_pages_may_be_left_open(keys: Keys) -> None:
    async with asking_router(keys, protect_pages=False) as router:
        assert (await get(f"http://{router.addresses.http}/metrics"))[0] == 200
        assert (await get(f"http://{router.addresses.http}/v1/models"))[0] == 401


async def test_tenants_share_no_cached_blocks(keys: Keys, tmp_path: Path) -> None:
    acme, other = keys.add("acme"), keys.add("other")
    secret = tmp_path / "secret"
    secret.write_text("s" * 40)
    config = make_config(router={"auth": {"keys_file": str(keys.path)}, "secret_file": str(secret)})
    async with run_test_router(config) as router, router.replica() as replica:
        for metadata in (acme, other, acme):
            await collect(router.inference.Generate(make_request(), metadata=metadata))
        salts = [command.submit.cache_salt for command in replica.received("submit")]
    assert salts[0] == salts[2] != salts[1]
    assert cache_salt("acme", key=b"guessed") not in salts


async def test_a_private_socket_asks_nobody(keys: Keys, tmp_path: Path) -> None:
    from cluster.edge.process import Router
    from cluster.text.null_tokenizer import NullTokenizer

    config = make_config(router={"auth": {"keys_file": str(keys.path)}})
    path = tmp_path / "router.sock"
    tokenizers = {model.name: NullTokenizer(1000) for model in config.models}
    router = Router(config, tokenizers=tokenizers, folder=tmp_path)
    try:
        addresses = await router.start()
        assert path.stat().st_mode & 0o777 == 0o600

        def ask(address: str) -> str:
            with Client(address) as client:
                return client.status().router_id

        assert await asyncio.to_thread(ask, f"unix:{path}") == router.router_id
        with pytest.raises(CallError, match="no API key"):
            await asyncio.to_thread(ask, addresses.grpc)
    finally:
        await router.stop(drain_s=0.0)


async def outcome(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def secure(router: TestRouter, ca: Path, **pem: Path) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes(),
        private_key=pem["key"].read_bytes() if pem else None,
        certificate_chain=pem["cert"].read_bytes() if pem else None,
    )
    return grpc.aio.secure_channel(
        router.addresses.grpc, credentials, options=[("grpc.use_local_subchannel_pool", 1)]
    )


async def test_certificates_change_without_a_restart(
    authority: Authority, tmp_path: Path, at_once: None
) -> None:
    pem = authority.issue("router")
    async with (
        run_test_router(make_config(router={"tls": {"cert": str(pem.cert), "key": str(pem.key)}})) as router,
        router.replica(),
        secure(router, authority.ca) as channel,
    ):
        call = inference_grpc.InferenceStub(channel).Generate(make_request(max_tokens=300))
        await call.initial_metadata()
        old = ssl.create_default_context(cafile=authority.ca)
        page = f"https://{router.addresses.http}/healthz"
        assert await get(page, old) == (200, "alive\n")
        newer = Authority(tmp_path / "newer", "new-ca")
        fresh = newer.issue("router")
        pem.cert.write_bytes(fresh.cert.read_bytes())  # For a moment the two do not fit together.
        assert await get(page, old) == (200, "alive\n")
        pem.key.write_bytes(fresh.key.read_bytes())
        assert await get(page, ssl.create_default_context(cafile=newer.ca)) == (200, "alive\n")
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await get(page, old)
        async with secure(router, newer.ca) as newer_channel:
            stub = inference_grpc.InferenceStub(newer_channel)
            assert len((await stub.ListModels(pb.ListModelsRequest())).models) == 2
        async with secure(router, authority.ca) as older_channel:
            stub = inference_grpc.InferenceStub(older_channel)
            refused = await fail(stub.ListModels(pb.ListModelsRequest(), timeout=60))
            assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert len((await collect(call)).token_ids) == 300


async def test_a_certificate_s_name_is_a_tenant(authority: Authority, tmp_path: Path) -> None:
    pem = authority.issue("router")
    config = make_config(
        router={
            "tls": {"cert": str(pem.cert), "key": str(pem.key), "client_ca": str(authority.ca)},
            "auth": {"client_names": {"acme.example": "acme"}, "operators": ["acme"]},
        }
    )
    known = authority.issue("me", alternative_name="acme.example")
    unknown = authority.issue("stranger")
    forged = Authority(tmp_path / "forged", "forged-ca").issue("me", alternative_name="acme.example")
    async with run_test_router(config) as router:
        answers = []
        for own in (known, unknown, forged):
            async with secure(router, authority.ca, cert=own.cert, key=own.key) as channel:
                call = inference_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=60)
                answers.append(await outcome(call))
        assert answers == [
            grpc.StatusCode.OK,
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.UNAVAILABLE,
        ]
        context = ssl.create_default_context(cafile=authority.ca)
        context.load_cert_chain(known.cert, known.key)
        assert (await get(f"https://{router.addresses.http}/metrics", context))[0] == 200
        with pytest.raises(OSError):  # An alert, or a connection that is closed in one of its ways.
            await get(
                f"https://{router.addresses.http}/metrics", ssl.create_default_context(cafile=authority.ca)
            )


async def test_our_own_client_shows_certificate_and_key(keys: Keys, authority: Authority) -> None:
    pem, own = authority.issue("router"), authority.issue("me")
    key = keys.add("acme")[0][1].removeprefix("Bearer ")
    config = make_config(
        router={
            "tls": {"cert": str(pem.cert), "key": str(pem.key), "client_ca": str(authority.ca)},
            "auth": {"keys_file": str(keys.path)},
        }
    )
    async with run_test_router(config) as router:

        def ask(access: Access) -> int:
            with Client(router.addresses.grpc, access) as client:
                return len(client.list_models())

        access = Access(ca=str(authority.ca), cert=str(own.cert), key_file=str(own.key), api_key=key)
        assert await asyncio.to_thread(ask, access) == 2


async def test_only_replicas_with_a_certificate_attach(authority: Authority, tmp_path: Path) -> None:
    pem, own = authority.issue("router", alternative_name="router.wattline"), authority.issue("replica")
    link_tls = {"ca": str(authority.ca), "cert": str(pem.cert), "key": str(pem.key)}
    credentials = LinkCredentials(
        ca=str(authority.ca), cert=str(own.cert), key=str(own.key), server_name="router.wattline"
    )
    forged = Authority(tmp_path / "forged", "forged-ca").issue("replica")
    async with run_test_router(make_config(router={"link_tls": link_tls})) as router:
        for stranger in (
            None,
            LinkCredentials(ca=str(authority.ca), cert=str(forged.cert), key=str(forged.key)),
        ):
            replica = router.replica(credentials=stranger)
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await replica.attach()
            await replica.leave()
        async with router.replica(credentials=credentials):
            answer = await collect(router.inference.Generate(make_request()))
    assert len(answer.token_ids) == 8


async def test_names_that_nobody_has_are_told_at_the_start(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    keys.add("acme")
    auth = {"models": {"acme": [MODEL, "tinny"], "acne": []}, "operators": ["acme", "ops"]}
    async with run_test_router(make_config(router={"auth": {"keys_file": str(keys.path), **auth}})):
        said = [record.getMessage() for record in caplog.records if "auth_name" in record.getMessage()]
    assert said == [
        "auth_name_unknown router.auth.models[acme]: got 'tinny'; served here: absent, tiny; "
        "did you mean 'tiny'?",
        "auth_name_unknown router.auth.models: got 'acne'; known by a key or auth.client_names: acme; "
        "did you mean 'acme'?",
        "auth_name_unknown router.auth.operators: got 'ops'; known by a key or auth.client_names: "
        "acme; correct it, unless it comes later",
    ]
